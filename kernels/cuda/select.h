// Exact selection on the device, without a sort: histograms of the digits of the keys find the last
// kept score, then an ordered compaction writes the positions. Ties at that score go to the lower
// positions, as on the CPU.
#ifndef KEEPSET_KERNELS_CUDA_SELECT_H_
#define KEEPSET_KERNELS_CUDA_SELECT_H_

#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/launch.h"

namespace keepset::kernels::cuda {

// What is chosen of one row. Plain data in device memory.
struct SelectRowArgs {
  const float* scores = nullptr;  // [length]
  int64_t length = 0;
  int64_t budget = 0;
  int64_t min_kept = 0;
  int64_t num_protected = 0;
  int64_t bitmap_begin = -1;   // words before the row's bitmap; -1: nothing is protected
  uint32_t threshold_key = 0;  // ScoreKey of the threshold
};

struct SelectRowResult {
  int64_t num_kept = 0;
  int64_t candidates = 0;
  int64_t filled = 0;
  int64_t first_nan = -1;  // then nothing is chosen
};

struct SelectParams {
  int32_t rows = 0;
  int64_t longest = 0;                  // largest length of a row
  const SelectRowArgs* args = nullptr;  // [rows]
  const uint32_t* bitmaps = nullptr;    // bit t % 32 of word t / 32: position t is protected
  SelectRowResult* results = nullptr;   // [rows]
  int32_t* keep_indices = nullptr;      // [rows, capacity]
  int64_t capacity = 0;                 // largest min(budget, length)
};

// One block per row, of whatever buffer it is. A warp takes 32 positions in a step, so that one
// word of a bitmap belongs to it.
struct SelectKernel {
  using Params = SelectParams;
  static constexpr int kMaxThreads = 1024;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Threads of the block of a row of `length` positions: a few positions each.
int SelectThreads(int64_t length);

cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_SELECT_H_
