#include "kernels/cuda/staging.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/row_offset.h"

namespace keepset::kernels::cuda {
namespace {

// Rows of `row_bytes` at `row(outer, inner)` one after the other into device memory.
absl::StatusOr<const std::byte*> PackRows(
    StreamState& state, int64_t outer_count, int64_t inner_count, int64_t row_bytes,
    absl::FunctionRef<const std::byte*(int64_t outer, int64_t inner)> row) {
  const int64_t bytes = outer_count * inner_count * row_bytes;
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const device, state.Temporary(bytes));
  std::vector<std::byte> packed(static_cast<size_t>(bytes));
  std::byte* to = packed.data();
  for (int64_t outer = 0; outer < outer_count; ++outer) {
    for (int64_t inner = 0; inner < inner_count; ++inner) {
      std::memcpy(to, row(outer, inner), static_cast<size_t>(row_bytes));
      to += row_bytes;
    }
  }
  KEEPSET_RETURN_IF_CUDA_ERROR(
      state.health(), cudaMemcpyAsync(device, packed.data(), packed.size(), cudaMemcpyHostToDevice,
                                      state.stream()));
  // The copy may read `packed` until then.
  KEEPSET_RETURN_IF_CUDA_ERROR(state.health(), cudaStreamSynchronize(state.stream()));
  return device;
}

template <typename View, typename Byte>
void Describe(const View& view, BasicDeviceRows<Byte>* rows) {
  const int64_t bytes = DTypeBytes(view.dtype);
  rows->num_heads = static_cast<int32_t>(view.num_kv_heads);
  rows->num_tokens = static_cast<int32_t>(view.seq_len);
  rows->head_dim = static_cast<int32_t>(view.head_dim);
  rows->dtype = view.dtype;
  rows->head_bytes = view.head_stride * bytes;
  rows->token_bytes = view.token_stride * bytes;
}

// A stride that is never applied must not spoil the alignment of the rows.
template <typename Byte>
void DropUnusedStrides(BasicDeviceRows<Byte>* rows) {
  if (rows->num_heads == 1) rows->head_bytes = 0;
  if (rows->num_tokens == 1) rows->token_bytes = 0;
}

template <typename View, typename Byte>
absl::Status DescribeDevice(StreamState& state, const View& view, BasicDeviceRows<Byte>* rows) {
  Describe(view, rows);
  DropUnusedStrides(rows);
  rows->data = view.data;
  if (view.block_size == 0) return absl::OkStatus();
  rows->block_bytes = view.block_stride * DTypeBytes(view.dtype);
  rows->block_size =
      FastDivider(static_cast<uint32_t>(std::min<int64_t>(view.block_size, int64_t{1} << 30)));
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const table,
      state.Upload(view.block_table.data(),
                   static_cast<int64_t>(view.block_table.size() * sizeof(int32_t))));
  rows->block_table = reinterpret_cast<const int32_t*>(table);
  return absl::OkStatus();
}

// [heads, tokens, head_dim] without gaps.
template <typename View, typename Byte>
void DescribeDense(const View& view, int64_t tokens, Byte* data, BasicDeviceRows<Byte>* rows) {
  Describe(view, rows);
  rows->data = data;
  rows->num_tokens = static_cast<int32_t>(tokens);
  rows->token_bytes = view.head_dim * DTypeBytes(view.dtype);
  rows->head_bytes = tokens * rows->token_bytes;
}

}  // namespace

absl::StatusOr<MemoryPlace> PlaceOf(StreamState& state, const void* data, absl::string_view what) {
  if (!state.is_queued()) return MemoryPlace::kDevice;
  cudaPointerAttributes attributes = {};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, data);
  if (error == cudaErrorInvalidValue) {
    cudaGetLastError();  // Host memory that the driver does not know is no error of ours.
    return MemoryPlace::kHost;
  }
  KEEPSET_RETURN_IF_ERROR(state.health().Check(error, "cudaPointerGetAttributes"));
  if (attributes.type == cudaMemoryTypeManaged) return MemoryPlace::kDevice;
  if (attributes.type != cudaMemoryTypeDevice) return MemoryPlace::kHost;
  if (attributes.device != state.traits().ordinal) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": memory of device ", attributes.device,
                                                   ", want host memory or device ",
                                                   state.traits().ordinal));
  }
  return MemoryPlace::kDevice;
}

absl::StatusOr<DeviceRows> StageRows(StreamState& state, const KvView& view,
                                     absl::string_view what) {
  KEEPSET_ASSIGN_OR_RETURN(const MemoryPlace place, PlaceOf(state, view.data, what));
  DeviceRows rows;
  if (place == MemoryPlace::kDevice) {
    KEEPSET_RETURN_IF_ERROR(DescribeDevice(state, view, &rows));
    return rows;
  }
  KEEPSET_ASSIGN_OR_RETURN(
      const std::byte* const packed,
      PackRows(state, view.num_kv_heads, view.seq_len, view.head_dim * DTypeBytes(view.dtype),
               [&](int64_t head, int64_t token) {
                 return view.data + RowOffsetBytes(view, head, token);
               }));
  DescribeDense(view, view.seq_len, packed, &rows);
  return rows;
}

absl::StatusOr<StagedMatrix> StageMatrix(StreamState& state, const HostMatrix& matrix,
                                         absl::string_view what) {
  KEEPSET_ASSIGN_OR_RETURN(const MemoryPlace place, PlaceOf(state, matrix.data, what));
  const int64_t bytes = DTypeBytes(matrix.dtype);
  StagedMatrix staged;
  if (place == MemoryPlace::kDevice) {
    staged.data = matrix.data;
    staged.head_bytes = matrix.heads > 1 ? matrix.head_stride * bytes : 0;
    staged.row_bytes = matrix.rows > 1 ? matrix.row_stride * bytes : 0;
    return staged;
  }
  staged.row_bytes = matrix.columns * bytes;
  staged.head_bytes = matrix.rows * staged.row_bytes;
  KEEPSET_ASSIGN_OR_RETURN(
      staged.data,
      PackRows(state, matrix.heads, matrix.rows, staged.row_bytes, [&](int64_t head, int64_t row) {
        return matrix.data + (head * matrix.head_stride + row * matrix.row_stride) * bytes;
      }));
  return staged;
}

absl::StatusOr<StagedDestination> StageDestination(StreamState& state, const MutableKvView& view,
                                                   int64_t tokens, absl::string_view what) {
  StagedDestination staged;
  KEEPSET_ASSIGN_OR_RETURN(staged.place, PlaceOf(state, view.data, what));
  if (staged.place == MemoryPlace::kDevice) {
    KEEPSET_RETURN_IF_ERROR(DescribeDevice(state, view, &staged.rows));
    return staged;
  }
  const int64_t bytes = view.num_kv_heads * tokens * view.head_dim * DTypeBytes(view.dtype);
  KEEPSET_ASSIGN_OR_RETURN(std::byte* const device, state.Temporary(bytes));
  DescribeDense(view, tokens, device, &staged.rows);
  return staged;
}

absl::StatusOr<PackedRows> QueueCopyBack(StreamState& state, const StagedDestination& staged) {
  PackedRows packed;
  if (staged.place == MemoryPlace::kDevice) return packed;
  packed.resize(static_cast<size_t>(staged.rows.num_heads * staged.rows.head_bytes));
  KEEPSET_RETURN_IF_CUDA_ERROR(state.health(),
                               cudaMemcpyAsync(packed.data(), staged.rows.data, packed.size(),
                                               cudaMemcpyDeviceToHost, state.stream()));
  return packed;
}

void UnpackRows(const StagedDestination& staged, const PackedRows& packed,
                absl::Span<const int64_t> counts, const MutableKvView& view) {
  if (staged.place == MemoryPlace::kDevice) return;
  const MutableDeviceRows& rows = staged.rows;
  for (int64_t head = 0; head < rows.num_heads; ++head) {
    const int64_t count = counts[counts.size() == 1 ? 0 : static_cast<size_t>(head)];
    for (int64_t token = 0; token < count; ++token) {
      std::memcpy(view.data + RowOffsetBytes(view, head, token),
                  packed.data() + head * rows.head_bytes + token * rows.token_bytes,
                  static_cast<size_t>(rows.token_bytes));
    }
  }
}

}  // namespace keepset::kernels::cuda
