#include "kernels/cuda/key_novelty.h"

#include <cstddef>
#include <cstdint>

#include "kernels/novelty_order.h"

namespace keepset::kernels::cuda {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t Aligned(int64_t bytes) { return CeilDiv(bytes, 256) * 256; }

struct Sizes {
  int64_t per_key;
  int64_t chunk_sums;
  int64_t totals;
  int64_t means;
};

Sizes SizesOf(const NoveltyParams& p) {
  const int64_t channels = int64_t{p.num_heads} * p.k.head_dim;
  return {Aligned(int64_t{p.num_heads} * p.k.num_tokens * int64_t{sizeof(float)}),
          Aligned(channels * p.num_chunks * int64_t{sizeof(float)}),
          Aligned(channels * int64_t{sizeof(double)}), Aligned(channels * int64_t{sizeof(float)})};
}

}  // namespace

int64_t NoveltyWorkspaceBytes(const NoveltyParams& params) {
  const Sizes sizes = SizesOf(params);
  return 2 * sizes.per_key + sizes.chunk_sums + sizes.totals + sizes.means;
}

void PlaceNoveltyWorkspace(std::byte* workspace, NoveltyParams* params) {
  const Sizes sizes = SizesOf(*params);
  params->largest = reinterpret_cast<float*>(workspace);
  workspace += sizes.per_key;
  params->inverses = reinterpret_cast<float*>(workspace);
  workspace += sizes.per_key;
  params->chunk_sums = reinterpret_cast<float*>(workspace);
  workspace += sizes.chunk_sums;
  params->totals = reinterpret_cast<double*>(workspace);
  workspace += sizes.totals;
  params->means = reinterpret_cast<float*>(workspace);
}

cudaError_t LaunchKeyNovelty(const NoveltyParams& params, cudaStream_t stream) {
  LaunchShape keys;
  keys.threads = NoveltyLengths::kMaxThreads;
  keys.grid_x = CeilDiv(params.k.num_tokens, keys.threads / 16);
  keys.grid_y = params.num_heads;
  LaunchShape chunks;
  chunks.threads = NoveltyChunkSums::kMaxThreads;
  chunks.grid_x = params.num_chunks;
  chunks.grid_y = params.num_heads;
  LaunchShape heads;
  heads.threads = NoveltyMeans::kMaxThreads;
  heads.grid_x = params.num_heads;
  heads.shared_bytes = sizeof(double);
  cudaError_t error = Launch<NoveltyLengths>(keys, params, stream);
  if (error == cudaSuccess) error = Launch<NoveltyChunkSums>(chunks, params, stream);
  if (error == cudaSuccess) error = Launch<NoveltyMeans>(heads, params, stream);
  if (error == cudaSuccess) error = Launch<NoveltyCosines>(keys, params, stream);
  return error;
}

}  // namespace keepset::kernels::cuda
