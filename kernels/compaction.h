// Kept rows of a tensor that move to its front, within it.
#ifndef KEEPSET_KERNELS_COMPACTION_H_
#define KEEPSET_KERNELS_COMPACTION_H_

#include <cstddef>
#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/views.h"

namespace keepset::kernels {

// Of checked operands (CheckCompact): one set for all heads, or one per KV head of x.

// Host memory. Rows move forward in order: kept rows lie at or behind the place they move to, so a
// row is read before anything is written over it.
void CompactHead(absl::Span<const absl::Span<const int32_t>> keep_indices, const MutableKvView& x,
                 int64_t head);

// What all rows that move take, and no more than `most_bytes` unless one block of rows does; 0:
// nothing moves.
int64_t CompactionScratchBytes(absl::Span<const absl::Span<const int32_t>> keep_indices,
                               const MutableKvView& x, int64_t most_bytes);

// ComputeBackend::GatherRows of one context.
using GatherFunction = absl::FunctionRef<absl::Status(
    const KvView& in, absl::Span<const absl::Span<const int32_t>>, const MutableKvView& out)>;
// Memory that `gather` reads and writes in any order, through `scratch` of at least
// CompactionScratchBytes of some limit: as many rows at a time as fit.
absl::Status CompactThrough(GatherFunction gather,
                            absl::Span<const absl::Span<const int32_t>> keep_indices,
                            const MutableKvView& x, absl::Span<std::byte> scratch);

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_COMPACTION_H_
