// Whatever traffic and tables say, the page stays within a size that can be computed beforehand.
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "service/metrics/metric_names.h"
#include "service/metrics/metrics.h"
#include "tests/service/metrics/exposition_page.h"

namespace keepset::service {
namespace {

std::unique_ptr<Metrics> NewTestMetrics() {
  return Metrics::New({"0.1.0", "cpu/scalar"}, {.policies = {"compilerkv"},
                                                .region_kinds = {"memfd"},
                                                .defaulted_inputs = {"ppl"},
                                                .table_sources = {"directory"}});
}

TableInfoSample TableFor(const std::string& model, int64_t entropy_bins, int64_t ppl_bins) {
  TableInfoSample table;
  table.model = model;
  table.name = "t-" + model;
  table.version = "1";
  table.digest = "sha256:aa";
  table.num_entropy_bins = entropy_bins;
  table.num_ppl_bins = ppl_bins;
  return table;
}

OperationSample SampleOf(const std::string& model, std::optional<int64_t> entropy_bin,
                         std::optional<int64_t> ppl_bin) {
  OperationSample sample;
  sample.policy = "compilerkv";
  sample.model = model;
  sample.outcome = "compressed";
  sample.reason = "none";
  sample.input_tokens = 100;
  sample.kept_tokens = 25;
  sample.entropy_bin = entropy_bin;
  sample.ppl_bin = ppl_bin;
  return sample;
}

int SeriesOf(const ExpositionPage& page, absl::string_view family) {
  int count = 0;
  for (const auto& [name, value] : page.series) count += absl::StartsWith(name, family) ? 1 : 0;
  return count;
}

constexpr char kRisk[] = "keepset_risk_bin_operations_total{";
constexpr char kModel[] = "keepset_model_operations_total{";

TEST(RiskBins, HaveOneSeriesForEachCellOfTheActiveGrid) {
  const auto metrics = NewTestMetrics();
  EXPECT_EQ(SeriesOf(ParsePage(metrics->Render()), kRisk), 1);
  metrics->SetTables({TableFor("llama", 20, 4)}, absl::UnixEpoch());
  metrics->RecordOperation(SampleOf("llama", 19, 3));
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(SeriesOf(page, kRisk), 20 * 4 + 1);
  EXPECT_EQ(ValueOf(page, absl::StrCat(kRisk, "entropy_bin=\"19\",ppl_bin=\"3\"}")), 1);
}

TEST(RiskBins, CountATableWithoutPerplexityAxisInItsOnlyBin) {
  const auto metrics = NewTestMetrics();
  metrics->SetTables({TableFor("llama", 3, 1)}, absl::UnixEpoch());
  metrics->RecordOperation(SampleOf("llama", 2, std::nullopt));
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()),
                    absl::StrCat(kRisk, "entropy_bin=\"2\",ppl_bin=\"0\"}")),
            1);
}

TEST(RiskBins, LeaveOutOperationsWithoutABinOfTheirOwn) {
  const auto metrics = NewTestMetrics();
  metrics->SetTables({TableFor("llama", 2, 1)}, absl::UnixEpoch());
  metrics->RecordOperation(SampleOf("llama", std::nullopt, 0));
  for (const auto& [name, value] : ParsePage(metrics->Render()).series) {
    if (absl::StartsWith(name, kRisk)) {
      EXPECT_EQ(value, 0) << name;
    }
  }
}

TEST(RiskBins, KeepTheirCountsWhileTheTableIsAway) {
  const auto metrics = NewTestMetrics();
  metrics->SetTables({TableFor("llama", 2, 1)}, absl::UnixEpoch());
  metrics->RecordOperation(SampleOf("llama", 1, 0));
  metrics->SetTables({}, absl::UnixEpoch());
  metrics->SetTables({TableFor("llama", 2, 1)}, absl::UnixEpoch());
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()),
                    absl::StrCat(kRisk, "entropy_bin=\"1\",ppl_bin=\"0\"}")),
            1);
}

TEST(ModelLabel, IsOtherForAModelWithoutAnActiveTable) {
  const auto metrics = NewTestMetrics();
  metrics->SetTables({TableFor("llama", 1, 1)}, absl::UnixEpoch());
  metrics->RecordOperation(SampleOf("llama", 0, 0));
  metrics->RecordOperation(SampleOf("made up", 0, 0));
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(ValueOf(page, absl::StrCat(kModel, "model=\"llama\",outcome=\"compressed\"}")), 1);
  EXPECT_EQ(ValueOf(page, absl::StrCat(kModel, "model=\"other\",outcome=\"compressed\"}")), 1);
  EXPECT_EQ(ValueOf(page, "keepset_model_input_tokens_total{model=\"llama\"}"), 100);
  EXPECT_EQ(ValueOf(page, "keepset_model_retained_tokens_total{model=\"llama\"}"), 25);
}

TEST(ModelLabel, GoesWithTheLastTableOfItsModel) {
  const auto metrics = NewTestMetrics();
  metrics->SetTables({TableFor("llama", 1, 1), TableFor("qwen", 1, 1)}, absl::UnixEpoch());
  metrics->SetTables({TableFor("qwen", 1, 1)}, absl::UnixEpoch());
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(SeriesOf(page, absl::StrCat(kModel, "model=\"llama\"")), 0);
  EXPECT_EQ(SeriesOf(page, absl::StrCat(kModel, "model=\"qwen\"")),
            static_cast<int>(std::size(kOutcomes)) + 1);
}

TEST(ModelLabel, CountsAModelCalledOtherAsOther) {
  const auto metrics = NewTestMetrics();
  const auto before = ParsePage(metrics->Render()).series.size();
  metrics->SetTables({TableFor("other", 0, 0)}, absl::UnixEpoch());
  metrics->RecordOperation(SampleOf("other", 0, 0));
  EXPECT_EQ(ParsePage(metrics->Render()).series.size(), before);
}

// Fixed seed; what a hostile client and a careless operator might send together.
TEST(Cardinality, StaysWithinTheStatedBoundUnderRandomTraffic) {
  const auto metrics = NewTestMetrics();
  const size_t fixed = ParsePage(metrics->Render()).series.size();
  constexpr int kTables = 100;
  std::mt19937_64 random(7);
  const auto text = [&random] {
    return absl::StrCat("x", std::uniform_int_distribution<int>(0, 100000)(random));
  };
  const auto number = [&random] { return std::uniform_int_distribution<int64_t>(-5, 300)(random); };
  for (int round = 0; round < 5; ++round) {
    std::vector<TableInfoSample> tables;
    for (int i = 0; i < kTables; ++i) tables.push_back(TableFor(text(), 1 + i, 1 + i / 2));
    metrics->SetTables(tables, absl::UnixEpoch());
    for (int i = 0; i < 2000; ++i) {
      OperationSample sample =
          SampleOf(i % 2 == 0 ? text() : tables[i % kTables].model, number(), number());
      sample.policy = text();
      sample.outcome = text();
      sample.reason = text();
      sample.defaulted_inputs = {text(), text()};
      metrics->RecordOperation(sample);
      metrics->RecordSessionEnd(text());
      metrics->RecordImportFailure(text());
      metrics->SetRegions(text(), 1, 1);
      metrics->EnableTableSource(text());
      metrics->RecordSourceSync(text(), absl::UnixEpoch());
      metrics->RecordSourceFailure(text());
    }
  }
  const size_t per_model = std::size(kOutcomes) + 1 + 2;
  const size_t bound = fixed + 2 * kTables + kMaxModelValues * per_model +
                       static_cast<size_t>(kMaxEntropyBins) * kMaxPplBins;
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_LE(page.series.size(), bound);
  // The limits were reached: the bound above is tight, but for the one series of "no table".
  EXPECT_GE(page.series.size(), bound - 2);
  EXPECT_EQ(page.families.size(), std::size(kAllMetrics));
}

}  // namespace
}  // namespace keepset::service
