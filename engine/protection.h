// Positions that stay whatever their score: what the caller protects, and what a policy's
// definition forces.
#ifndef KEEPSET_ENGINE_PROTECTION_H_
#define KEEPSET_ENGINE_PROTECTION_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/operation_types.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

// Half-open, ascending and disjoint in every list of this file unless said otherwise.
using PositionRanges = std::vector<kernels::SelectArgs::Range>;

// Sorts and joins ranges that touch or overlap; drops empty ones.
PositionRanges JoinRanges(PositionRanges ranges);

int64_t CountPositions(const PositionRanges& ranges);

// Sink, window and spans of the request. A sink or window longer than the prompt is the whole
// prompt. InvalidArgument: negative counts, or a span outside [0, seq_len).
absl::StatusOr<PositionRanges> ProtectedRanges(const OperationSpec& spec);

// `protected_ranges` and as many positions of `forced` as `limit` leaves room for, the most recent
// ones first. CountPositions(protected_ranges) <= limit.
PositionRanges AddForcedRanges(const PositionRanges& protected_ranges, const PositionRanges& forced,
                               int64_t limit);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_PROTECTION_H_
