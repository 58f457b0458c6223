// Window scores by Hopper's own instructions: the kernels of window_scores.h that need tensor cores
// (RowStats and Columns) with keys loaded by TMA and products by wgmma. Same rows, units, outputs,
// references, masks and faults; chunks of kChunkTokens again, merged by MergeRowStats.
//
// A block is three warp groups. The first loads: one warp feeds a ring of stages of keys, the other
// three compute value norms. The other two do mathematics, taking turns at the tensor cores: while
// one multiplies, the other is in its exponentials. The query rows stay in shared memory.
//
// Blocks are as many as the device has multiprocessors, and each takes a fixed, contiguous share of
// the work; none waits for another one.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_WINDOW_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_WINDOW_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

constexpr int kHopperThreads = 384;
// Tokens of a stage of Columns: the rows of one product.
constexpr int kColumnTokens = 64;
// Query rows of one product of RowStats, and that a block of it holds at most: what one KV head of
// 8 query heads has with 64 rows of each, so that its keys are read once.
constexpr int kProductRows = 64;
constexpr int kStatsRows = 512;
// Statistics that RowStats gives of a chunk: of its even tiles, and of its odd ones.
constexpr int kStatsParts = 2;
// A row in shared memory is spans of 64 channels, 128 bytes each: what one swizzled box holds.
constexpr int kSpanChannels = 64;
constexpr int kSpanBytes = 128;
// Eight rows of a span repeat the swizzle.
constexpr int kSwizzleBytes = 1024;
constexpr int kMaxStages = 8;

// What one block of Columns holds of a unit: some of its outputs, of which each takes a whole
// multiple of eight slots.
struct HopperPart {
  int32_t unit = 0;  // of its layer
  int32_t first_output = 0;
  int32_t num_outputs = 0;
  int32_t num_slots = 0;
  int32_t is_first = 0;  // of its unit: takes the value norms
};

// What keys look like to TMA. Dimensions 1 to 3 of the map in the order of their strides.
struct HopperKeys {
  int32_t num_spans = 0;
  int32_t box_tokens = 0;  // tokens of one load, all of one block of the table
  int32_t token_dim = 0;
  int32_t head_dim = 0;
  int32_t block_dim = 0;  // 0: contiguous, the map has three dimensions

  bool operator==(const HopperKeys&) const = default;
};

struct HopperParams {
  WindowParams window;
  HopperKeys keys;
  const HopperPart* parts = nullptr;  // [num_parts], of one layer
  int32_t num_parts = 0;
  int32_t num_stages = 0;
  int32_t num_slots = 0;   // query rows that shared memory has room for
  int64_t first_part = 0;  // of this launch, counted through all layers
  int64_t num_tasks = 0;   // tiles of Columns, chunks of RowStats
  CUtensorMap key_maps[kMaxWindowLayers];
};
// Parameters of sm_90 may have 32,764 bytes.
static_assert(sizeof(HopperParams) <= 16384);

// kSlots: query rows of one product, 64, 128 or 256.
template <DType kType, int kSlots>
struct HopperColumns {
  using Params = HopperParams;
  static constexpr int kThreads = kHopperThreads;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// kTokens: of a stage and of one product, 64 or 128.
template <DType kType, int kTokens>
struct HopperRowStats {
  using Params = HopperParams;
  static constexpr int kThreads = kHopperThreads;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Queues the kernel; instantiated by hopper_window.cu.
template <typename Kernel>
cudaError_t LaunchHopper(const LaunchShape& shape, const typename Kernel::Params& params,
                         cudaStream_t stream);

// Memory of the keys of one layer, beyond what kernels need to know.
struct KeyMemory {
  int64_t size_bytes = 0;  // readable from the data on
  int32_t last_block = 0;  // entry of the block table that holds the last token; 0 when contiguous
};

struct HopperDevice {
  int64_t max_shared_bytes = 0;
  int multiprocessors = 0;
};

struct HopperPlan {
  std::string unsuited;  // why these rows take the portable kernels; empty when they need not
  HopperKeys keys;
  std::vector<HopperPart> parts;   // of one layer
  std::vector<int32_t> unit_part;  // [num_units + 1], first part of each unit
  int32_t columns_slots = 0;       // of one product: 64, 128 or 256
  int32_t columns_capacity = 0;    // query rows in shared memory
  int32_t columns_stages = 0;
  int32_t stats_tokens = 0;  // of a stage: 64 or 128
  int32_t stats_rows = 0;    // query rows in shared memory, at most kStatsRows: a part of a unit
  int32_t stats_stages = 0;
  // As in WindowPlan, but enough of them to keep every multiprocessor busy for a while, and so many
  // that blocks have equally much to do. The second-level cache does not hold the keys of so many:
  // both passes read them from memory, which costs less than the start of a launch.
  int64_t units_at_once = 1;
};

// Decides for all layers of a launch alike. portable: the plan for the same params. units, outputs:
// the lists of params, on the host. keys: of each layer. device: of the card.
HopperPlan PlanHopper(const WindowParams& params, const WindowPlan& portable,
                      absl::Span<const WindowUnit> units, absl::Span<const WindowOutput> outputs,
                      absl::Span<const KeyMemory> keys, const HopperDevice& device);

// The map of one layer's keys; plan.unsuited is empty.
TensorMapSpec KeyMap(const WindowParams& params, const HopperPlan& plan, int layer,
                     const KeyMemory& memory);

// Queues the whole call as LaunchWindowScores does, params.window, .parts and .key_maps being set.
cudaError_t LaunchHopperWindowScores(HopperParams params, const HopperPlan& plan,
                                     int multiprocessors, cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_WINDOW_H_
