#include "kernels/cuda/key_novelty.h"
#include "kernels/cuda/key_novelty_kernel.h"
#include "kernels/cuda/simt_device.cuh"

namespace keepset::kernels::cuda {

#define KEEPSET_LAUNCH(Kernel) \
  template cudaError_t Launch<Kernel>(const LaunchShape&, const NoveltyParams&, cudaStream_t)

KEEPSET_LAUNCH(NoveltyLengths);
KEEPSET_LAUNCH(NoveltyChunkSums);
KEEPSET_LAUNCH(NoveltyMeans);
KEEPSET_LAUNCH(NoveltyCosines);

#undef KEEPSET_LAUNCH

}  // namespace keepset::kernels::cuda
