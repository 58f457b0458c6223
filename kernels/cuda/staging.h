// Tensors of a call where kernels can read them. Device memory is used in place; host memory
// (inline tensors, memfd regions, captures) is packed and copied to the device, which waits for the
// copy.
#ifndef KEEPSET_KERNELS_CUDA_STAGING_H_
#define KEEPSET_KERNELS_CUDA_STAGING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/device_rows.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

enum class MemoryPlace { kHost, kDevice };

// Where `data` lies. InvalidArgument for memory of another device.
absl::StatusOr<MemoryPlace> PlaceOf(StreamState& state, const void* data, absl::string_view what);

// A validated K or V. The block table is uploaded.
absl::StatusOr<DeviceRows> StageRows(StreamState& state, const KvView& view,
                                     absl::string_view what);

// A matrix of rows for each head: queries, a tile, or a log-sum-exp (one row per head).
struct StagedMatrix {
  const std::byte* data = nullptr;  // device memory
  int64_t head_bytes = 0;
  int64_t row_bytes = 0;
};
// strides in elements; the `columns` elements of a row are contiguous.
struct HostMatrix {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  int64_t heads = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};
absl::StatusOr<StagedMatrix> StageMatrix(StreamState& state, const HostMatrix& matrix,
                                         absl::string_view what);

// A destination: the device memory itself, or a temporary [heads, tokens, d] that is copied into
// host memory after the op: QueueCopyBack, Wait, UnpackRows.
struct StagedDestination {
  MutableDeviceRows rows;
  MemoryPlace place = MemoryPlace::kDevice;
};
// tokens: rows of each head that are written, at most.
absl::StatusOr<StagedDestination> StageDestination(StreamState& state, const MutableKvView& view,
                                                   int64_t tokens, absl::string_view what);
// Receives the temporary at the next Wait, until which it stays where it is; empty for device
// memory.
using PackedRows = std::vector<std::byte>;
absl::StatusOr<PackedRows> QueueCopyBack(StreamState& state, const StagedDestination& staged);
// counts: rows of each head, one for all or one per head.
void UnpackRows(const StagedDestination& staged, const PackedRows& packed,
                absl::Span<const int64_t> counts, const MutableKvView& view);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_STAGING_H_
