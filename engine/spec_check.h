// Checks of what a caller states before any work: the shape of an operation, its prompt signals,
// and each layer's views against that shape.
#ifndef KEEPSET_ENGINE_SPEC_CHECK_H_
#define KEEPSET_ENGINE_SPEC_CHECK_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/operation_types.h"
#include "engine/policies/retention_policy.h"

namespace keepset::engine {

// Model counts, seq_len, num_rows, scale and dtype. `needs` decides whether rows must be observed.
// The upper limits keep every product of shapes inside 63 bits.
absl::Status CheckShape(const OperationSpec& spec, const Requirements& needs);

// [W] ascending positions of the observed rows: the given ones, or the last W. Only where `needs`
// has probe rows may they lie behind the prompt, up to kMaxProbeTokens of them.
inline constexpr int64_t kMaxProbeTokens = 4096;
absl::StatusOr<std::vector<int64_t>> ResolveRowPositions(const OperationSpec& spec,
                                                         const Requirements& needs);

// spec.ppl, else exp(-mean(window_logprobs)), else nothing. InvalidArgument when a given signal is
// not finite or a perplexity not positive.
absl::StatusOr<std::optional<double>> ResolvePerplexity(const OperationSpec& spec);

// Everything about one layer but its values: presence by `needs`, shapes, dtypes, bounds.
absl::Status CheckObservation(const OperationSpec& spec, const Requirements& needs, int64_t layer,
                              const LayerObservation& observation);

// K or V of one layer as the source of a gather.
absl::Status CheckKv(const OperationSpec& spec, const kernels::KvView& view, int64_t head_dim,
                     absl::string_view what);

// The head_dim of V.
int64_t ValueHeadDim(const OperationSpec& spec);

// NotFound: a table is needed and none given. FailedPrecondition: one of another kind.
absl::Status CheckTable(const OperationSpec& spec, const Requirements& needs);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_SPEC_CHECK_H_
