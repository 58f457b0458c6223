// What a table of kind observation_heads wants of one request: which heads of which layers observe,
// and with which of the request's rows.
#ifndef KEEPSET_ENGINE_POLICIES_OBSERVATION_PLAN_H_
#define KEEPSET_ENGINE_POLICIES_OBSERVATION_PLAN_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_parameters.h"
#include "kernels/compute_backend.h"
#include "tables/model_fingerprint.h"
#include "tables/observation_heads_table.h"

namespace keepset::engine {

// What a request says about its rows.
struct ObservationRequest {
  // Positions [begin, end) of the rows that observe; absent: all rows of the prompt.
  std::optional<std::pair<int64_t, int64_t>> observe;
  std::optional<std::string> probe;  // the probe whose rows the request brings
};

// Parameters observe (BEGIN:END) and probe.
absl::StatusOr<ObservationRequest> ReadObservationRequest(PolicyParameters& parameters);

// What one layer observes: of each kind, in the order of its score rows.
struct LayerObservations {
  std::vector<tables::HeadObservation> attention;  // ordered by head
  std::vector<tables::HeadObservation> novelty;
  // Of `attention`: heads of the model, rows as indices into the request's W.
  std::vector<kernels::HeadRows> head_rows;
  std::vector<int64_t> kv_heads;  // of `novelty`

  bool empty() const { return attention.empty() && novelty.empty(); }
};

// The table of the operation. NotFound without one, FailedPrecondition of another kind.
absl::StatusOr<const tables::ObservationHeadsTable*> ObservationTableOf(const OperationSpec& spec);

// Layers, heads and rows that a worker of `model`, which fits the table, has to send.
InputNeeds NeedsOfObservations(const tables::ObservationHeadsTable& table,
                               const tables::ModelFingerprint& model);

// One plan for each layer of [0, num_layers), which the table's layers fit into. `row_positions`
// [W] ascending: those at or behind `seq_len` are rows of a probe. InvalidArgument for rows that
// the table or the request names and the request does not bring, FailedPrecondition for another
// probe than the table's.
absl::StatusOr<std::vector<LayerObservations>> PlanObservations(
    const tables::ObservationHeadsTable& table, const ObservationRequest& request,
    int64_t num_layers, absl::Span<const int64_t> row_positions, int64_t seq_len);

// `head_rows` with their places in tensors that hold `qo_heads` alone; as they are when that is
// empty. InvalidArgument for a head that the tensors do not hold, naming it after `where`.
absl::StatusOr<std::vector<kernels::HeadRows>> PlaceHeads(
    absl::Span<const kernels::HeadRows> head_rows, absl::Span<const int64_t> qo_heads,
    const tables::ModelFingerprint& model, absl::string_view where);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_OBSERVATION_PLAN_H_
