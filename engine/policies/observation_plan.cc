#include "engine/policies/observation_plan.h"

#include <algorithm>
#include <tuple>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"

namespace keepset::engine {
namespace {

using tables::HeadObservation;
using tables::ObservationHeadsTable;
using tables::ObservedRows;

// Columns of one layer's observations, as spec_check bounds those of other policies.
constexpr int64_t kMaxColumns = int64_t{1} << 29;

// Rows of the request, as indices into its W rows.
struct RowRange {
  int64_t begin = 0;
  int64_t end = 0;

  bool empty() const { return begin >= end; }
};

struct RequestRows {
  RowRange prompt;
  RowRange observed;  // those of the prompt that `observe` names, or all
  RowRange probe;     // behind the prompt
};

// The observations of weight above 0, ordered by layer, head and rows.
std::vector<HeadObservation> Ordered(const ObservationHeadsTable& table) {
  std::vector<HeadObservation> ordered;
  for (const HeadObservation& one : table.observations()) {
    if (one.weight > 0.0f) ordered.push_back(one);
  }
  std::sort(ordered.begin(), ordered.end(), [](const HeadObservation& a, const HeadObservation& b) {
    return std::tie(a.layer, a.head, a.rows) < std::tie(b.layer, b.head, b.rows);
  });
  return ordered;
}

bool Contains(const std::vector<int64_t>& values, int64_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

absl::StatusOr<std::pair<int64_t, int64_t>> ParseObserve(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  int64_t begin = 0;
  int64_t end = 0;
  if (parts.size() == 2 && absl::SimpleAtoi(parts[0], &begin) && absl::SimpleAtoi(parts[1], &end) &&
      begin >= 0 && begin < end) {
    return std::pair(begin, end);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("policy observation_heads: parameter observe=", text,
                   ", want BEGIN:END with 0 <= BEGIN < END, positions of the observing rows"));
}

absl::StatusOr<RowRange> RowsOfSpan(std::pair<int64_t, int64_t> span,
                                    absl::Span<const int64_t> positions, int64_t seq_len) {
  const auto [begin, end] = span;
  if (end > seq_len) {
    return absl::InvalidArgumentError(absl::StrCat("parameter observe=", begin, ":", end,
                                                   ", want rows inside the prompt of ", seq_len,
                                                   " positions"));
  }
  int64_t wanted = begin;
  const auto* const first = std::lower_bound(positions.begin(), positions.end(), begin);
  for (const int64_t* it = first; it != positions.end() && *it == wanted && wanted < end; ++it) {
    ++wanted;
  }
  if (wanted < end) {
    return absl::InvalidArgumentError(
        absl::StrCat("parameter observe=", begin, ":", end, ": position ", wanted,
                     " is not among row_positions, want queries of every row in it"));
  }
  const int64_t index = first - positions.begin();
  return RowRange{index, index + (end - begin)};
}

absl::StatusOr<RequestRows> FindRows(const ObservationHeadsTable& table,
                                     const ObservationRequest& request,
                                     absl::Span<const int64_t> positions, int64_t seq_len) {
  RequestRows rows;
  const int64_t prompt_end =
      std::lower_bound(positions.begin(), positions.end(), seq_len) - positions.begin();
  rows.prompt = {0, prompt_end};
  rows.observed = rows.prompt;
  rows.probe = {prompt_end, static_cast<int64_t>(positions.size())};
  if (request.observe.has_value()) {
    KEEPSET_ASSIGN_OR_RETURN(rows.observed, RowsOfSpan(*request.observe, positions, seq_len));
  }
  const std::optional<tables::ObservationProbe>& probe = table.settings().probe;
  if (!rows.probe.empty() && !probe.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "row_positions[", rows.probe.begin, "]=", positions[rows.probe.begin], ", want 0..",
        seq_len - 1, ": table ", table.identity().name, " names no probe"));
  }
  if (request.probe.has_value() && (!probe.has_value() || probe->name != *request.probe)) {
    return absl::FailedPreconditionError(
        absl::StrCat("parameter probe=", *request.probe, ": table ", table.identity().name,
                     probe.has_value() ? absl::StrCat(" wants probe ", probe->name)
                                       : std::string(" names no probe")));
  }
  return rows;
}

absl::StatusOr<RowRange> RowsOf(const HeadObservation& one, const ObservationHeadsTable& table,
                                const ObservationRequest& request, const RequestRows& rows) {
  const std::string where =
      absl::StrCat("table ", table.identity().name, ": layer ", one.layer, " head ", one.head,
                   " observes ", tables::ObservedRowsName(one.rows));
  if (tables::NeedsProbeRows(one.rows)) {
    const std::string& name = table.settings().probe->name;
    if (rows.probe.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, " of probe ", name,
                       ", want rows of the probe: row_positions at or behind seq_len"));
    }
    if (!request.probe.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ", want parameter probe=", name, " beside the probe's rows"));
    }
    return rows.probe;
  }
  const RowRange chosen = one.rows == ObservedRows::kLastRow
                              ? RowRange{std::max<int64_t>(0, rows.prompt.end - 1), rows.prompt.end}
                              : rows.observed;
  if (!chosen.empty()) return chosen;
  return absl::InvalidArgumentError(
      absl::StrCat(where, ", want at least one observed row of the prompt (num_rows)"));
}

}  // namespace

absl::StatusOr<ObservationRequest> ReadObservationRequest(PolicyParameters& parameters) {
  ObservationRequest request;
  if (const std::optional<std::string> observe = parameters.OptionalText("observe")) {
    KEEPSET_ASSIGN_OR_RETURN(request.observe, ParseObserve(*observe));
  }
  request.probe = parameters.OptionalText("probe");
  return request;
}

absl::StatusOr<const ObservationHeadsTable*> ObservationTableOf(const OperationSpec& spec) {
  if (spec.table == nullptr) {
    return absl::NotFoundError(
        "policy observation_heads needs a table of kind observation_heads, none given");
  }
  const ObservationHeadsTable* table = spec.table->AsObservationHeads();
  if (table != nullptr) return table;
  return absl::FailedPreconditionError(absl::StrCat("policy observation_heads: table ",
                                                    spec.table->identity().name,
                                                    " lists no observing heads"));
}

InputNeeds NeedsOfObservations(const ObservationHeadsTable& table,
                               const tables::ModelFingerprint& model) {
  const int64_t group = model.num_qo_heads / model.num_kv_heads;
  InputNeeds needs;
  for (const HeadObservation& one : Ordered(table)) {
    if (needs.layers.empty() || needs.layers.back().layer != one.layer) {
      needs.layers.emplace_back().layer = one.layer;
    }
    LayerInputNeeds& layer = needs.layers.back();
    layer.keys = true;
    const bool is_key = one.rows == ObservedRows::kKeyNovelty;
    const int64_t kv_head = is_key ? one.head : one.head / group;
    if (!Contains(layer.kv_heads, kv_head)) layer.kv_heads.push_back(kv_head);
    if (!is_key) {
      layer.queries = true;
      if (!Contains(layer.qo_heads, one.head)) layer.qo_heads.push_back(one.head);
    }
    needs.last_row = needs.last_row || one.rows == ObservedRows::kLastRow;
    needs.observed_rows = needs.observed_rows || one.rows == ObservedRows::kMaxRows ||
                          one.rows == ObservedRows::kMeanRows;
    needs.probe_rows = needs.probe_rows || tables::NeedsProbeRows(one.rows);
  }
  for (LayerInputNeeds& layer : needs.layers) {
    std::sort(layer.kv_heads.begin(), layer.kv_heads.end());
  }
  if (needs.probe_rows) {
    needs.probe_name = table.settings().probe->name;
    needs.probe_text = table.settings().probe->text;
  }
  return needs;
}

absl::StatusOr<std::vector<LayerObservations>> PlanObservations(
    const ObservationHeadsTable& table, const ObservationRequest& request, int64_t num_layers,
    absl::Span<const int64_t> row_positions, int64_t seq_len) {
  KEEPSET_ASSIGN_OR_RETURN(const RequestRows rows,
                           FindRows(table, request, row_positions, seq_len));
  std::vector<LayerObservations> plans(num_layers);
  for (const HeadObservation& one : Ordered(table)) {
    LayerObservations& plan = plans[one.layer];
    if (one.rows == ObservedRows::kKeyNovelty) {
      plan.novelty.push_back(one);
      plan.kv_heads.push_back(one.head);
      continue;
    }
    KEEPSET_ASSIGN_OR_RETURN(const RowRange range, RowsOf(one, table, request, rows));
    const bool is_max = one.rows == ObservedRows::kMaxRows || one.rows == ObservedRows::kProbeMax;
    plan.attention.push_back(one);
    plan.head_rows.push_back({one.head, range.begin, range.end - range.begin,
                              is_max ? kernels::RowReduction::kMax : kernels::RowReduction::kMean});
    const auto columns = static_cast<int64_t>(plan.attention.size()) * seq_len;
    if (columns > kMaxColumns) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", one.layer,
                                                     ": observations x seq_len = ", columns,
                                                     ", want at most ", kMaxColumns));
    }
  }
  return plans;
}

absl::StatusOr<std::vector<kernels::HeadRows>> PlaceHeads(
    absl::Span<const kernels::HeadRows> head_rows, absl::Span<const int64_t> qo_heads,
    const tables::ModelFingerprint& model, absl::string_view where) {
  std::vector<kernels::HeadRows> placed(head_rows.begin(), head_rows.end());
  if (qo_heads.empty()) return placed;
  for (kernels::HeadRows& one : placed) {
    const int64_t* const found = std::lower_bound(qo_heads.begin(), qo_heads.end(), one.head);
    if (found == qo_heads.end() || *found != one.head) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": qo_heads has no head ", one.head,
                       ", want every head that the table lists (GetRequirements)"));
    }
    one.kv_head = one.head / (model.num_qo_heads / model.num_kv_heads);
    one.head = found - qo_heads.begin();
  }
  return placed;
}

}  // namespace keepset::engine
