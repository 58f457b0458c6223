#include "service/metrics/table_series.h"

#include <algorithm>
#include <iterator>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "service/metrics/families.h"
#include "service/metrics/metric_names.h"

namespace keepset::service {
namespace {

using prometheus::Counter;

prometheus::Labels LabelsOf(const std::array<std::string, 4>& key) {
  return {{"model", key[0]}, {"name", key[1]}, {"version", key[2]}, {"digest", key[3]}};
}

prometheus::Labels CellLabels(absl::string_view entropy_bin, absl::string_view ppl_bin) {
  return {{"entropy_bin", std::string(entropy_bin)}, {"ppl_bin", std::string(ppl_bin)}};
}

}  // namespace

TableSeries::TableSeries(prometheus::Registry& registry)
    : info_(GaugeFamily(registry, kTableInfo)),
      created_(GaugeFamily(registry, kTableCreatedTimestampSeconds)),
      model_operations_(CounterFamily(registry, kModelOperationsTotal)),
      model_input_tokens_(CounterFamily(registry, kModelInputTokensTotal)),
      model_retained_tokens_(CounterFamily(registry, kModelRetainedTokensTotal)),
      risk_bins_(CounterFamily(registry, kRiskBinOperationsTotal)),
      other_cell_(risk_bins_.Add(CellLabels(kOtherValue, kOtherValue))),
      other_model_(AddModel(std::string(kOtherValue))) {
  SetTables({});
}

void TableSeries::SetTables(const std::vector<TableInfoSample>& tables) {
  std::map<TableKey, double> wanted;  // to the time of creation
  for (const TableInfoSample& table : tables) {
    wanted[{table.model, table.name, table.version, table.digest}] =
        absl::ToDoubleSeconds(table.created - absl::UnixEpoch());
  }
  const bool none = wanted.empty();
  if (none) wanted[TableKey{}] = 0;
  absl::MutexLock lock(&mutex_);
  // New series appear before old ones go: a scrape in between never finds a gap.
  for (const auto& [key, created] : wanted) {
    TableGauges& gauges = tables_[key];
    if (gauges.info == nullptr) {
      gauges = {.info = &info_.Add(LabelsOf(key)), .created = &created_.Add(LabelsOf(key))};
    }
    gauges.info->Set(none ? 0 : 1);
    gauges.created->Set(created);
  }
  for (auto it = tables_.begin(); it != tables_.end();) {
    if (wanted.contains(it->first)) {
      ++it;
      continue;
    }
    info_.Remove(it->second.info);
    created_.Remove(it->second.created);
    it = tables_.erase(it);
  }
  SetModels(tables);
  for (const TableInfoSample& table : tables) GrowGrid(table.num_entropy_bins, table.num_ppl_bins);
}

void TableSeries::SetModels(const std::vector<TableInfoSample>& tables) {
  std::set<std::string> models;
  for (const TableInfoSample& table : tables) {
    if (table.model != kOtherValue) models.insert(table.model);
  }
  if (models.size() > kMaxModelValues) {
    models.erase(std::next(models.begin(), kMaxModelValues), models.end());
  }
  for (const std::string& model : models) {
    if (!models_.contains(model)) models_[model] = AddModel(model);
  }
  for (auto it = models_.begin(); it != models_.end();) {
    const auto model = it++;
    if (models.contains(model->first)) continue;
    RemoveModel(model->second);
    models_.erase(model);
  }
}

TableSeries::ModelCounters TableSeries::AddModel(const std::string& model) {
  ModelCounters counters;
  const auto add = [&](absl::string_view outcome) {
    counters.operations[std::string(outcome)] =
        &model_operations_.Add({{"model", model}, {"outcome", std::string(outcome)}});
  };
  for (absl::string_view outcome : kOutcomes) add(outcome);
  add(kOtherValue);
  counters.input_tokens = &model_input_tokens_.Add({{"model", model}});
  counters.retained_tokens = &model_retained_tokens_.Add({{"model", model}});
  return counters;
}

void TableSeries::RemoveModel(const ModelCounters& counters) {
  for (const auto& [outcome, counter] : counters.operations) model_operations_.Remove(counter);
  model_input_tokens_.Remove(counters.input_tokens);
  model_retained_tokens_.Remove(counters.retained_tokens);
}

void TableSeries::GrowGrid(int64_t num_entropy_bins, int64_t num_ppl_bins) {
  num_entropy_bins = std::min<int64_t>(num_entropy_bins, kMaxEntropyBins);
  num_ppl_bins = std::min<int64_t>(num_ppl_bins, kMaxPplBins);
  for (int64_t e = 0; e < num_entropy_bins; ++e) {
    for (int64_t p = 0; p < num_ppl_bins; ++p) {
      Counter*& cell = cells_[{e, p}];
      if (cell != nullptr) continue;
      cell = &risk_bins_.Add(CellLabels(absl::StrCat(e), absl::StrCat(p)));
    }
  }
}

void TableSeries::RecordOperation(const OperationSample& sample) {
  absl::ReaderMutexLock lock(&mutex_);
  const auto model = models_.find(sample.model);
  const ModelCounters& counters = model == models_.end() ? other_model_ : model->second;
  auto outcome = counters.operations.find(sample.outcome);
  if (outcome == counters.operations.end()) outcome = counters.operations.find(kOtherValue);
  outcome->second->Increment();
  counters.input_tokens->Increment(static_cast<double>(sample.input_tokens));
  counters.retained_tokens->Increment(static_cast<double>(sample.kept_tokens));
  if (!sample.entropy_bin.has_value()) return;
  // A table without a perplexity axis has one bin of it.
  const auto cell = cells_.find({*sample.entropy_bin, sample.ppl_bin.value_or(0)});
  (cell == cells_.end() ? other_cell_ : *cell->second).Increment();
}

}  // namespace keepset::service
