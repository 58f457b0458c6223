// Ops on rows of K or V and on given attention tiles.
#ifndef KEEPSET_KERNELS_CUDA_ROW_OPS_H_
#define KEEPSET_KERNELS_CUDA_ROW_OPS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/compute_backend.h"
#include "kernels/cuda/device_rows.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/launch.h"

namespace keepset::kernels::cuda {

struct RowNormsParams {
  DeviceRows rows;       // [Hkv, T, d]
  float* out = nullptr;  // [Hkv, T]
  uint64_t* fault = nullptr;
};

// One warp takes kRowsPerWarp rows of one head.
struct RowNormsKernel {
  using Params = RowNormsParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  static constexpr int kRowsPerWarp = 16;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// One row of the result: a reduction over some rows of one head of the tile.
struct TileOutput {
  int32_t head = 0;
  int32_t first_row = 0;
  int32_t num_rows = 0;
  RowReduction reduction = RowReduction::kMean;
  float divisor = 1.0f;  // of kMean
};

struct TileColumnsParams {
  const std::byte* tile = nullptr;  // [H, W, T]
  int64_t head_bytes = 0;
  int64_t row_bytes = 0;
  DType dtype = DType::kF32;
  const TileOutput* outputs = nullptr;  // [num_outputs], device memory
  int32_t num_outputs = 0;
  int32_t all_rows = 0;  // W
  int32_t seq_len = 0;
  const int32_t* row_limits = nullptr;  // [W], device memory
  float* out = nullptr;                 // [num_outputs, T]
  uint64_t* fault = nullptr;
};

// One thread per column and output; rows are added in ascending order.
struct TileColumnsKernel {
  using Params = TileColumnsParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Copies rows of `row_bytes` in units of `unit_bytes` (16, 8, 4 or 2).
struct GatherTensor {
  DeviceRows in;
  MutableDeviceRows out;
  const int32_t* indices = nullptr;  // device memory: the sets one after the other
  const int32_t* offsets = nullptr;  // [num_sets + 1], device memory
  int32_t num_sets = 1;              // 1: shared by all heads; else one per head
  int32_t row_bytes = 0;
  int32_t unit_bytes = 16;
};

struct GatherParams {
  const GatherTensor* tensors = nullptr;  // [num_tensors], device memory
  int32_t num_tensors = 0;
  int32_t most_heads = 0;  // of any tensor
  int32_t longest = 0;     // rows of the largest set
};

// 8 warps share the rows of one head of one tensor. Each thread has 64 bytes on their way in rows
// of 16-byte units: 64 KiB of a multiprocessor with four blocks, more than its share of the
// bandwidth times the latency of memory (docs/gpu.md).
struct GatherKernel {
  using Params = GatherParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 4;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// The widest unit that divides every address and the row.
int GatherUnitBytes(const DeviceRows& in, const MutableDeviceRows& out, int64_t row_bytes);

cudaError_t LaunchRowNorms(const RowNormsParams& params, cudaStream_t stream);
cudaError_t LaunchTileColumns(const TileColumnsParams& params, cudaStream_t stream);
cudaError_t LaunchGather(const GatherParams& params, cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_ROW_OPS_H_
