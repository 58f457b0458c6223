// The launches of kernels/cuda on the emulator: queued on an emulated stream like the real ones.
#include "kernels/cuda/columns_kernel.h"
#include "kernels/cuda/cublas_kernel.h"
#include "kernels/cuda/hopper_columns_kernel.h"
#include "kernels/cuda/hopper_row_stats_kernel.h"
#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/key_novelty_kernel.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/row_ops_kernel.h"
#include "kernels/cuda/row_stats_kernel.h"
#include "kernels/cuda/score_glue_kernel.h"
#include "kernels/cuda/select_kernel.h"
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/hopper_emulator.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels::cuda {
namespace {

// As the device's launches: asks for shared memory, then launches with what the process has.
cudaError_t TakeShared(const void* function, int64_t bytes, int64_t without_asking) {
  if (bytes > EmulatedSharedBytes()) return cudaErrorInvalidConfiguration;
  if (bytes > without_asking) {
    const cudaError_t error = AllowMostShared(function);
    if (error != cudaSuccess) return error;
  }
  return bytes > EmulatedSharedLimit(function) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

template <typename Kernel>
cudaError_t Launch(const LaunchShape& shape, const typename Kernel::Params& params,
                   cudaStream_t stream) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return cudaSuccess;
  // What a device would refuse.
  if (shape.threads < 1 || shape.threads > Kernel::kMaxThreads || shape.grid_y > 65535 ||
      shape.grid_z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const cudaError_t error = TakeShared(reinterpret_cast<const void*>(&Launch<Kernel>),
                                       shape.shared_bytes, kSharedWithoutAsking);
  if (error != cudaSuccess) return error;
  if (const cudaError_t refused = CountLaunch(); refused != cudaSuccess) return refused;
  return QueueEmulated(stream, [shape, params] {
    EmulateGrid(shape, [&params](const EmulatedThread& thread) { Kernel::Run(thread, params); });
  });
}

#define KEEPSET_LAUNCH(...)                                                                \
  template cudaError_t Launch<__VA_ARGS__>(const LaunchShape&, const __VA_ARGS__::Params&, \
                                           cudaStream_t)

KEEPSET_LAUNCH(RowNormsKernel);
KEEPSET_LAUNCH(TileColumnsKernel);
KEEPSET_LAUNCH(GatherKernel);
KEEPSET_LAUNCH(GlueKernel);
KEEPSET_LAUNCH(SumKernel);
KEEPSET_LAUNCH(SlideKernel);
KEEPSET_LAUNCH(PrefixKernel);
KEEPSET_LAUNCH(SelectKernel);
KEEPSET_LAUNCH(PrepareRows);
KEEPSET_LAUNCH(MergeRowStats);
KEEPSET_LAUNCH(MmaRowStats<DType::kBF16>);
KEEPSET_LAUNCH(MmaRowStats<DType::kF16>);
KEEPSET_LAUNCH(FmaRowStats);
KEEPSET_LAUNCH(MmaColumns<DType::kBF16>);
KEEPSET_LAUNCH(MmaColumns<DType::kF16>);
KEEPSET_LAUNCH(FmaColumns);
KEEPSET_LAUNCH(PackQueries);
KEEPSET_LAUNCH(PackKeys);
KEEPSET_LAUNCH(PieceStats);
KEEPSET_LAUNCH(PieceColumns);
KEEPSET_LAUNCH(NoveltyLengths);
KEEPSET_LAUNCH(NoveltyChunkSums);
KEEPSET_LAUNCH(NoveltyMeans);
KEEPSET_LAUNCH(NoveltyCosines);

#undef KEEPSET_LAUNCH

template <typename Kernel>
cudaError_t LaunchHopper(const LaunchShape& shape, const typename Kernel::Params& params,
                         cudaStream_t stream) {
  if (shape.grid_x < 1 || shape.threads != Kernel::kThreads) return cudaErrorInvalidConfiguration;
  const cudaError_t error =
      TakeShared(reinterpret_cast<const void*>(&LaunchHopper<Kernel>), shape.shared_bytes, 0);
  if (error != cudaSuccess) return error;
  if (const cudaError_t refused = CountLaunch(); refused != cudaSuccess) return refused;
  return QueueEmulated(stream, [shape, params] {
    EmulateGrid(shape, [&params](const EmulatedThread& thread) {
      Kernel::Run(EmulatedHopperThread(thread), params);
    });
  });
}

#define KEEPSET_LAUNCH_HOPPER(...)                                                        \
  template cudaError_t LaunchHopper<__VA_ARGS__>(const LaunchShape&, const HopperParams&, \
                                                 cudaStream_t)

KEEPSET_LAUNCH_HOPPER(HopperColumns<DType::kBF16, 64>);
KEEPSET_LAUNCH_HOPPER(HopperColumns<DType::kBF16, 128>);
KEEPSET_LAUNCH_HOPPER(HopperColumns<DType::kBF16, 256>);
KEEPSET_LAUNCH_HOPPER(HopperColumns<DType::kF16, 64>);
KEEPSET_LAUNCH_HOPPER(HopperColumns<DType::kF16, 128>);
KEEPSET_LAUNCH_HOPPER(HopperColumns<DType::kF16, 256>);
KEEPSET_LAUNCH_HOPPER(HopperRowStats<DType::kBF16, 64>);
KEEPSET_LAUNCH_HOPPER(HopperRowStats<DType::kBF16, 128>);
KEEPSET_LAUNCH_HOPPER(HopperRowStats<DType::kF16, 64>);
KEEPSET_LAUNCH_HOPPER(HopperRowStats<DType::kF16, 128>);

#undef KEEPSET_LAUNCH_HOPPER

}  // namespace keepset::kernels::cuda
