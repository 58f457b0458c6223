// What every backend refuses before it computes: shapes, ranges and arguments of the ops of
// compute_backend.h. InvalidArgument says where, the value, and what would be right.
#ifndef KEEPSET_KERNELS_OP_CHECKS_H_
#define KEEPSET_KERNELS_OP_CHECKS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/compute_backend.h"
#include "kernels/views.h"

namespace keepset::kernels {

// The status with `what` before its message; OK stays OK.
absl::Status NamedBy(absl::string_view what, const absl::Status& status);

// `x` is [rows, cols].
absl::Status CheckShape(const ScoreBuffer& x, int64_t rows, int64_t cols, absl::string_view name);

// row_positions: [num_rows], strictly ascending from 0; a position at or behind the prompt's end
// sees all of it.
absl::Status CheckRowPositions(absl::Span<const int64_t> row_positions, int64_t num_rows,
                               absl::string_view what);
// Heads in order and in range, rows within [0, num_rows).
absl::Status CheckHeadRows(absl::Span<const HeadRows> heads, int64_t num_heads, int64_t num_rows,
                           absl::string_view what);
// What is asked for: the listed heads, or all of them with all rows; kLast as the one row it reads.
std::vector<HeadRows> WantedRows(absl::Span<const HeadRows> heads, RowReduction reduction,
                                 int64_t num_heads, int64_t num_rows);

absl::Status CheckWindow(const WindowArgs& args, const ScoreBuffer& out);
// The KV head of args.k that `one` reads. Args are checked.
int64_t KvHeadOf(const WindowArgs& args, const HeadRows& one);
// The most query heads that read the same KV head, at least 1. Args are checked.
int64_t MostHeadsOfAKvHead(const WindowArgs& args);
// One destination per layer, and at least one layer.
absl::Status CheckLayerCount(absl::Span<const WindowArgs> layers,
                             absl::Span<ScoreBuffer* const> outs);
absl::Status CheckTile(const TileArgs& args, const ScoreBuffer& out);
// "layer 3: attn_tile: head 2 row 5"; without the row where the tile has one.
std::string TileRowName(absl::string_view tile, int64_t num_rows, int64_t head, int64_t row);
// What the mean over `rows` divides by.
inline int64_t MeanRows(const TileArgs& args, const HeadRows& rows) {
  return args.mean_rows > 0 ? args.mean_rows : rows.num_rows;
}
absl::Status CheckRowNorms(const KvView& x, absl::string_view what, const ScoreBuffer& out);
absl::Status CheckMergeRows(const ScoreBuffer& in, absl::Span<const float> weights,
                            const ScoreBuffer& out);
absl::Status CheckMultiply(const ScoreBuffer& y, const ScoreBuffer& x);
absl::Status CheckPool(int64_t kernel, int64_t length, const ScoreBuffer& x);
// excluded: ascending and disjoint within the row.
absl::Status CheckNormalize(absl::Span<const SelectArgs::Range> excluded, const ScoreBuffer& x);
// kv_heads in range, `out` [kv_heads.size(), T].
absl::Status CheckKeyNovelty(const KvView& k, absl::Span<const int64_t> kv_heads,
                             absl::string_view what, const ScoreBuffer& out);
absl::Status CheckDilate(int64_t dilate);
absl::Status CheckFill(int64_t begin, int64_t end, const ScoreBuffer& x);
absl::Status CheckMassRow(int64_t row, const ScoreBuffer& x);
// A mass that an entropy can be taken of.
absl::Status CheckMass(double sum);
// One entry per row, or one for all.
absl::Status CheckSelect(absl::Span<const SelectArgs> args, const ScoreBuffer& scores);
absl::Status CheckSelectRow(const SelectArgs& args, int64_t length, int64_t row);
absl::Status CheckCopySize(const ScoreBuffer& x, int64_t count);
// Shapes, keep sets, capacity, and that source and destination lie apart.
absl::Status CheckGather(const KvView& in, absl::Span<const absl::Span<const int32_t>> keep_indices,
                         const MutableKvView& out);

// Shapes, keep sets that fit x and ascend.
absl::Status CheckCompact(absl::Span<const absl::Span<const int32_t>> keep_indices,
                          const MutableKvView& x);

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_OP_CHECKS_H_
