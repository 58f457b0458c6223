// The operations of the CPU backend, one per function; cpu_backend.cc assembles them. Shapes,
// semantics and errors are those of compute_backend.h.
#ifndef KEEPSET_KERNELS_CPU_OPS_H_
#define KEEPSET_KERNELS_CPU_OPS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/compute_backend.h"
#include "kernels/cpu/cpu_context.h"

namespace keepset::kernels::cpu {

absl::Status WindowColumns(CpuContext& context, const WindowArgs& args, ScoreBuffer& out);
absl::Status TileColumns(CpuContext& context, const TileArgs& args, ScoreBuffer& out);
absl::Status RowNorms(CpuContext& context, const KvView& x, absl::string_view what,
                      ScoreBuffer& out);
absl::Status DivideByRowMean(CpuContext& context, float eps, ScoreBuffer& x);
absl::Status MergeRows(CpuContext& context, const ScoreBuffer& in, Merge merge,
                       absl::Span<const float> weights, ScoreBuffer& out);
absl::Status Accumulate(CpuContext& context, const ScoreBuffer& x, Merge merge, float weight,
                        ScoreBuffer& acc);
absl::Status Multiply(CpuContext& context, const ScoreBuffer& y, float factor, ScoreBuffer& x);
absl::Status Pool(CpuContext& context, PoolKind kind, int64_t kernel, int64_t length,
                  ScoreBuffer& x);
absl::Status DilateForward(CpuContext& context, int64_t dilate, ScoreBuffer& x);
absl::Status Fill(CpuContext& context, int64_t begin, int64_t end, float value, ScoreBuffer& x);
absl::StatusOr<ComputeBackend::Mass> MassAndEntropy(CpuContext& context, const ScoreBuffer& x,
                                                    int64_t row);
absl::StatusOr<std::vector<Selection>> Select(CpuContext& context, const ScoreBuffer& scores,
                                              absl::Span<const SelectArgs> args);
absl::Status CompactRows(CpuContext& context,
                         absl::Span<const absl::Span<const int32_t>> keep_indices,
                         const MutableKvView& x);
absl::Status GatherRows(CpuContext& context, const KvView& in,
                        absl::Span<const absl::Span<const int32_t>> keep_indices,
                        const MutableKvView& out);

absl::Status KeyNovelty(CpuContext& context, const KvView& k, absl::Span<const int64_t> kv_heads,
                        absl::string_view what, ScoreBuffer& out);
absl::Status NormalizeRows(CpuContext& context, Normalization normalization,
                           absl::Span<const SelectArgs::Range> excluded, ScoreBuffer& x);

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_OPS_H_
