// Novelty of keys on the device: how far a key's direction lies from the mean direction of its
// head. Four launches: lengths of the keys, sums of their directions per chunk, the mean direction
// of each head, the cosines with it. Sums are in the order of novelty_order.h, so that the bits are
// those of the CPU backend.
#ifndef KEEPSET_KERNELS_CUDA_KEY_NOVELTY_H_
#define KEEPSET_KERNELS_CUDA_KEY_NOVELTY_H_

#include <cstdint>

#include "kernels/cuda/device_rows.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/launch.h"

namespace keepset::kernels::cuda {

// All pointers are device memory.
struct NoveltyParams {
  DeviceRows k;                       // [Hkv, T, d]
  const int32_t* kv_heads = nullptr;  // [num_heads]
  int32_t num_heads = 0;              // listed ones
  int32_t num_chunks = 0;             // of kNoveltyChunk positions
  float* largest = nullptr;           // [num_heads, T]: largest magnitude of a key's elements
  float* inverses = nullptr;          // [num_heads, T]: 1 / length of the key over `largest`
  float* chunk_sums = nullptr;        // [num_heads, num_chunks, d]
  double* totals = nullptr;           // [num_heads, d]
  float* means = nullptr;             // [num_heads, d], of unit length or zero
  float* out = nullptr;               // [num_heads, T]
  uint64_t* fault = nullptr;          // place: index in kv_heads * T + position
};

// Half a warp per key.
struct NoveltyLengths {
  using Params = NoveltyParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// A block per chunk and head, a thread per channel.
struct NoveltyChunkSums {
  using Params = NoveltyParams;
  static constexpr int kMaxThreads = 128;
  static constexpr int kMinBlocksPerMultiprocessor = 4;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// A block per head.
struct NoveltyMeans {
  using Params = NoveltyParams;
  static constexpr int kMaxThreads = 128;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Half a warp per key.
struct NoveltyCosines {
  using Params = NoveltyParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Bytes of device memory behind largest, inverses, chunk_sums, totals and means.
int64_t NoveltyWorkspaceBytes(const NoveltyParams& params);
// workspace: aligned to 256 bytes.
void PlaceNoveltyWorkspace(std::byte* workspace, NoveltyParams* params);

cudaError_t LaunchKeyNovelty(const NoveltyParams& params, cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_KEY_NOVELTY_H_
