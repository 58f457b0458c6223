// The operations of the CUDA backend, one per function; cuda_backend.cc assembles them. Shapes,
// semantics and errors are those of compute_backend.h. Score buffers are CudaScoreBuffers.
#ifndef KEEPSET_KERNELS_CUDA_OPS_H_
#define KEEPSET_KERNELS_CUDA_OPS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "kernels/compute_backend.h"
#include "kernels/cuda/cuda_context.h"

namespace keepset::kernels::cuda {

absl::Status WindowColumns(StreamState& state, const WindowArgs& args, ScoreBuffer& out);
absl::Status WindowColumnsOfLayers(StreamState& state, absl::Span<const WindowArgs> layers,
                                   absl::Span<ScoreBuffer* const> outs);
absl::Status TileColumns(StreamState& state, const TileArgs& args, ScoreBuffer& out);
absl::Status RowNorms(StreamState& state, const KvView& x, absl::string_view what,
                      ScoreBuffer& out);

absl::Status KeyNovelty(StreamState& state, const KvView& k, absl::Span<const int64_t> kv_heads,
                        absl::string_view what, ScoreBuffer& out);
absl::Status DivideByRowMean(StreamState& state, float eps, ScoreBuffer& x);
absl::Status NormalizeRows(StreamState& state, Normalization normalization,
                           absl::Span<const SelectArgs::Range> excluded, ScoreBuffer& x);
absl::Status MergeRows(StreamState& state, const ScoreBuffer& in, Merge merge,
                       absl::Span<const float> weights, ScoreBuffer& out);
absl::Status Accumulate(StreamState& state, const ScoreBuffer& x, Merge merge, float weight,
                        ScoreBuffer& acc);
absl::Status Multiply(StreamState& state, const ScoreBuffer& y, float factor, ScoreBuffer& x);
absl::Status Pool(StreamState& state, PoolKind kind, int64_t kernel, int64_t length,
                  ScoreBuffer& x);
absl::Status DilateForward(StreamState& state, int64_t dilate, ScoreBuffer& x);
absl::Status Fill(StreamState& state, int64_t begin, int64_t end, float value, ScoreBuffer& x);
absl::StatusOr<ComputeBackend::Mass> MassAndEntropy(StreamState& state, const ScoreBuffer& x,
                                                    int64_t row);
absl::StatusOr<std::vector<ComputeBackend::Mass>> MassAndEntropyOfEach(
    StreamState& state, absl::Span<const ScoreBuffer* const> buffers);

absl::StatusOr<std::vector<Selection>> Select(StreamState& state, const ScoreBuffer& scores,
                                              absl::Span<const SelectArgs> args);
absl::StatusOr<std::vector<std::vector<Selection>>> SelectEach(StreamState& state,
                                                               absl::Span<const SelectTask> tasks);
absl::Status GatherRows(StreamState& state, const KvView& in,
                        absl::Span<const absl::Span<const int32_t>> keep_indices,
                        const MutableKvView& out);
absl::Status GatherRowsOfEach(StreamState& state, absl::Span<const GatherTask> tasks);
absl::Status ReserveCompaction(StreamState& state, absl::Span<const CompactTask> tasks);
absl::Status CompactRows(StreamState& state,
                         absl::Span<const absl::Span<const int32_t>> keep_indices,
                         const MutableKvView& x);

// The fault of norms of rows [heads, seq_len].
absl::Status DescribeNormFault(uint64_t code, const std::string& what, int64_t seq_len);

// An array for kernels, valid until the next Wait.
template <typename Value>
absl::StatusOr<const Value*> UploadArray(StreamState& state, absl::Span<const Value> values) {
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const device,
      state.Upload(values.data(), static_cast<int64_t>(values.size() * sizeof(Value))));
  return reinterpret_cast<const Value*>(device);
}

// The backend's own buffer; a buffer that nobody wrote yet is zeroed on the stream first.
inline CudaScoreBuffer& Cuda(ScoreBuffer& buffer) { return static_cast<CudaScoreBuffer&>(buffer); }
inline absl::StatusOr<const float*> Readable(StreamState& state, const ScoreBuffer& buffer) {
  // Zeroing what nobody wrote does not change what the buffer holds.
  return const_cast<CudaScoreBuffer&>(static_cast<const CudaScoreBuffer&>(buffer)).Use(state);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_OPS_H_
