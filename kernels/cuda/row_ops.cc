#include "kernels/cuda/row_ops.h"

#include <algorithm>
#include <cstdint>

namespace keepset::kernels::cuda {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename Byte>
int64_t AddressBits(const BasicDeviceRows<Byte>& rows) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data)) | rows.head_bytes |
         rows.token_bytes | rows.block_bytes;
}

}  // namespace

int GatherUnitBytes(const DeviceRows& in, const MutableDeviceRows& out, int64_t row_bytes) {
  const int64_t bits = AddressBits(in) | AddressBits(out) | row_bytes;
  int unit = 16;
  while (bits % unit != 0) unit /= 2;
  return unit;
}

cudaError_t LaunchRowNorms(const RowNormsParams& params, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = RowNormsKernel::kMaxThreads;
  shape.grid_x = CeilDiv(params.rows.num_tokens, shape.threads / 32 * RowNormsKernel::kRowsPerWarp);
  shape.grid_y = params.rows.num_heads;
  return Launch<RowNormsKernel>(shape, params, stream);
}

cudaError_t LaunchTileColumns(const TileColumnsParams& params, cudaStream_t stream) {
  LaunchShape shape;
  shape.threads = TileColumnsKernel::kMaxThreads;
  shape.grid_x = CeilDiv(params.seq_len, shape.threads);
  shape.grid_y = params.num_outputs;
  return Launch<TileColumnsKernel>(shape, params, stream);
}

cudaError_t LaunchGather(const GatherParams& params, cudaStream_t stream) {
  constexpr int64_t kRowsPerBlock = 64;
  LaunchShape shape;
  shape.threads = GatherKernel::kMaxThreads;
  shape.grid_x = CeilDiv(params.longest, kRowsPerBlock);
  shape.grid_y = params.most_heads;
  shape.grid_z = params.num_tensors;
  return Launch<GatherKernel>(shape, params, stream);
}

}  // namespace keepset::kernels::cuda
