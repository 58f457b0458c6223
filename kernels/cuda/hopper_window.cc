#include "kernels/cuda/hopper_window.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/hopper_pipeline_inl.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int64_t kMaxUnitsOfLaunch = 65535;        // a grid dimension of MergeRowStats
constexpr int64_t kStrideLimit = int64_t{1} << 40;  // of a tensor map
constexpr int kMostBoxTokens = 64;
constexpr int kRowWarps = 8;  // warps of the kernels that take one row per warp
// Fewer do not hide the way of the keys behind the products.
constexpr int kLeastStages = 4;
// Of each block of RowStats in a launch, where the call has so many; and no more than twice as
// many.
constexpr int64_t kLeastChunks = 8;
// What one launch more costs, in chunks of a block.
constexpr int64_t kLaunchChunks = 1;
// Of 128 tokens, or of rows of more than 256 bytes; each is multiplied with all rows of the block.
constexpr int kStatsLeastStages = 2;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int32_t PaddedRows(int32_t rows) {
  return static_cast<int32_t>(CeilDiv(rows, kSlotGroup) * kSlotGroup);
}

enum class KeyDim { kToken, kHead, kBlock };

struct Dim {
  KeyDim kind;
  int64_t size;
  int64_t stride_bytes;
};

// Dimensions 1 and up of the keys, by stride; those without extent, whose stride says nothing,
// last. num_blocks: 0 when contiguous.
std::vector<Dim> KeyDims(const DeviceRows& k, int64_t num_blocks) {
  std::vector<Dim> dims;
  const bool is_paged = num_blocks > 0;
  dims.push_back(
      {KeyDim::kToken, is_paged ? int64_t{k.block_size.divisor()} : k.num_tokens, k.token_bytes});
  dims.push_back({KeyDim::kHead, k.num_heads, k.head_bytes});
  if (is_paged) dims.push_back({KeyDim::kBlock, num_blocks, k.block_bytes});
  const auto key = [](const Dim& dim) {
    // Blocks are many in another layer of the launch.
    return dim.size > 1 || dim.kind == KeyDim::kBlock ? dim.stride_bytes : kStrideLimit;
  };
  std::stable_sort(dims.begin(), dims.end(),
                   [&](const Dim& a, const Dim& b) { return key(a) < key(b); });
  int64_t next = int64_t{k.head_dim} * DTypeBytes(k.dtype);
  for (Dim& dim : dims) {
    if (dim.size <= 1 && key(dim) == kStrideLimit) dim.stride_bytes = next;
    next = dim.stride_bytes * dim.size;
  }
  return dims;
}

bool IsPaged(const WindowParams& params) { return params.layers[0].k_table != nullptr; }

// Bytes from the start of a block to the end of its last row.
int64_t BlockExtent(const DeviceRows& k) {
  return (k.num_heads - 1) * k.head_bytes + (int64_t{k.block_size.divisor()} - 1) * k.token_bytes +
         int64_t{k.head_dim} * DTypeBytes(k.dtype);
}

// Blocks of which every row can be read.
int64_t WholeBlocks(const DeviceRows& k, const KeyMemory& memory) {
  const int64_t extent = BlockExtent(k);
  return memory.size_bytes < extent ? 0 : (memory.size_bytes - extent) / k.block_bytes + 1;
}

// Why keys cannot be described to TMA; empty when they can.
std::string KeysUnsuited(const WindowParams& params, absl::Span<const KeyMemory> keys) {
  const DeviceRows& k = params.shape.k;
  if (IsPaged(params)) {
    if (k.block_size.divisor() % kSlotGroup != 0) {
      return absl::StrCat("block_size=", k.block_size.divisor(), ", want a multiple of 8");
    }
    for (size_t layer = 0; layer < keys.size(); ++layer) {
      if (keys[layer].last_block >= WholeBlocks(k, keys[layer])) {
        return absl::StrCat("block ", keys[layer].last_block, " of layer ", layer,
                            " of the call does not lie in the tensor as a whole");
      }
    }
  }
  int64_t before = int64_t{k.head_dim} * DTypeBytes(k.dtype);
  const std::vector<Dim> dims = KeyDims(k, IsPaged(params) ? 2 : 0);
  for (size_t i = 0; i < dims.size(); ++i) {
    const int64_t stride = dims[i].stride_bytes;
    if (stride % 16 != 0 || stride < before || stride >= kStrideLimit ||
        (i > 0 && stride % before != 0)) {
      return absl::StrCat("a stride of ", stride, " bytes after one of ", before,
                          ", want multiples of 16 and of each other");
    }
    before = stride;
  }
  return "";
}

HopperKeys DescribeKeys(const WindowParams& params) {
  const DeviceRows& k = params.shape.k;
  HopperKeys keys;
  keys.num_spans = static_cast<int32_t>(CeilDiv(k.head_dim, kSpanChannels));
  keys.box_tokens =
      IsPaged(params) ? std::gcd<int, int>(static_cast<int>(k.block_size.divisor()), kMostBoxTokens)
                      : kMostBoxTokens;
  const std::vector<Dim> dims = KeyDims(k, IsPaged(params) ? 2 : 0);
  for (size_t i = 0; i < dims.size(); ++i) {
    const auto place = static_cast<int32_t>(i + 1);
    if (dims[i].kind == KeyDim::kToken) keys.token_dim = place;
    if (dims[i].kind == KeyDim::kHead) keys.head_dim = place;
    if (dims[i].kind == KeyDim::kBlock) keys.block_dim = place;
  }
  return keys;
}

// Shared memory of either kernel.
int64_t ColumnsBytes(const HopperLayout& layout) { return kSwizzleBytes + layout.end; }
int64_t StatsBytes(const HopperLayout& layout) { return kSwizzleBytes + layout.norms; }

// Stages that fit beside `slots` query rows, of which a block takes kernel_bytes without stages.
int64_t NumStages(int spans, int slots, int tokens, int64_t max_shared_bytes,
                  int64_t (*kernel_bytes)(const HopperLayout&)) {
  const HopperLayout layout(spans, slots, tokens, 0);
  const int64_t left = max_shared_bytes - kernel_bytes(layout);
  return left < 0 ? 0 : std::min<int64_t>(left / layout.stage_bytes, kMaxStages);
}

// The fewest parts of a unit's rows of which each fits, all of one size: each reads all keys again.
void PlanRowStats(int max_unit_rows, int spans, int64_t max_shared_bytes, HopperPlan* plan) {
  plan->stats_tokens = spans <= 2 ? 128 : 64;
  const int64_t products = CeilDiv(max_unit_rows, kProductRows);
  for (int64_t parts = CeilDiv(products, kStatsRows / kProductRows); parts <= products; ++parts) {
    plan->stats_rows = static_cast<int32_t>(CeilDiv(products, parts) * kProductRows);
    plan->stats_stages = static_cast<int32_t>(
        NumStages(spans, plan->stats_rows, plan->stats_tokens, max_shared_bytes, StatsBytes));
    if (plan->stats_stages >= kStatsLeastStages) return;
  }
}

// Outputs of each unit in parts of at most `capacity` slots.
void MakeParts(absl::Span<const WindowUnit> units, absl::Span<const WindowOutput> outputs,
               int32_t capacity, HopperPlan* plan) {
  for (size_t u = 0; u < units.size(); ++u) {
    plan->unit_part.push_back(static_cast<int32_t>(plan->parts.size()));
    HopperPart part;
    part.unit = static_cast<int32_t>(u);
    part.first_output = units[u].first_output;
    part.is_first = 1;
    for (int32_t j = 0; j < units[u].num_outputs; ++j) {
      const int32_t slots = PaddedRows(outputs[units[u].first_output + j].num_rows);
      if (part.num_slots + slots > capacity) {
        plan->parts.push_back(part);
        part.first_output += part.num_outputs;
        part.num_outputs = 0;
        part.num_slots = 0;
        part.is_first = 0;
      }
      ++part.num_outputs;
      part.num_slots += slots;
    }
    plan->parts.push_back(part);
  }
  plan->unit_part.push_back(static_cast<int32_t>(plan->parts.size()));
}

// Of least to most units in a launch, as many as make all launches of a call shortest: every block
// takes as many chunks as the one that has most.
int64_t UnitsAtOnce(int64_t least, int64_t most, int64_t all_units, int64_t chunks_of_unit,
                    int64_t blocks) {
  const auto chunks = [&](int64_t units) {
    return units == 0 ? 0 : CeilDiv(units * chunks_of_unit, blocks) + kLaunchChunks;
  };
  int64_t best = least;
  int64_t fewest = 0;
  for (int64_t units = least; units <= most; ++units) {
    const int64_t cost = all_units / units * chunks(units) + chunks(all_units % units);
    if (units == least || cost < fewest) {
      best = units;
      fewest = cost;
    }
  }
  return best;
}

template <DType kType>
cudaError_t LaunchColumns(const LaunchShape& shape, const HopperParams& params, int slots,
                          cudaStream_t stream) {
  if (slots == 64) return LaunchHopper<HopperColumns<kType, 64>>(shape, params, stream);
  if (slots == 128) return LaunchHopper<HopperColumns<kType, 128>>(shape, params, stream);
  return LaunchHopper<HopperColumns<kType, 256>>(shape, params, stream);
}

template <DType kType>
cudaError_t LaunchRowStats(const LaunchShape& shape, const HopperParams& params, int tokens,
                           cudaStream_t stream) {
  if (tokens == 64) return LaunchHopper<HopperRowStats<kType, 64>>(shape, params, stream);
  return LaunchHopper<HopperRowStats<kType, 128>>(shape, params, stream);
}

}  // namespace

HopperPlan PlanHopper(const WindowParams& params, const WindowPlan& portable,
                      absl::Span<const WindowUnit> units, absl::Span<const WindowOutput> outputs,
                      absl::Span<const KeyMemory> keys, const HopperDevice& device) {
  const int64_t max_shared_bytes = device.max_shared_bytes;
  HopperPlan plan;
  const DeviceRows& k = params.shape.k;
  if (portable.tile != TileKind::kMma) {
    plan.unsuited = "types, head_dim or alignment of q and k do not suit tensor cores";
    return plan;
  }
  if (k.head_dim < kSpanChannels) {
    plan.unsuited = absl::StrCat("head_dim=", k.head_dim, ", want at least ", kSpanChannels);
    return plan;
  }
  plan.unsuited = KeysUnsuited(params, keys);
  if (!plan.unsuited.empty()) return plan;
  plan.keys = DescribeKeys(params);
  const int spans = plan.keys.num_spans;

  int32_t largest = 0;  // output
  int32_t wanted = 0;   // slots of a unit
  for (const WindowUnit& unit : units) {
    int32_t slots = 0;
    for (int32_t j = 0; j < unit.num_outputs; ++j) {
      const int32_t some = PaddedRows(outputs[unit.first_output + j].num_rows);
      largest = std::max(largest, some);
      slots += some;
    }
    wanted = std::max(wanted, slots);
  }
  for (const int32_t slots : {64, 128, 256, 512}) {
    const int64_t stages = NumStages(spans, slots, kColumnTokens, max_shared_bytes, ColumnsBytes);
    if (stages < kLeastStages) break;
    plan.columns_capacity = slots;
    plan.columns_slots = std::min(slots, 256);
    plan.columns_stages = static_cast<int32_t>(stages);
    if (slots >= wanted) break;
  }
  PlanRowStats(params.max_unit_rows, spans, max_shared_bytes, &plan);
  if (plan.columns_capacity == 0 || plan.stats_stages < kStatsLeastStages) {
    plan.unsuited =
        absl::StrCat("head_dim=", k.head_dim, " leaves no room for ", kLeastStages,
                     " stages of keys in ", max_shared_bytes, " bytes of shared memory");
    return plan;
  }
  if (largest > plan.columns_capacity) {
    plan.unsuited = absl::StrCat(largest, " rows of one head, want at most ", plan.columns_capacity,
                                 " with head_dim=", k.head_dim);
    return plan;
  }
  MakeParts(units, outputs, plan.columns_capacity, &plan);
  const int64_t all_units = int64_t{params.num_layers} * params.num_units;
  const int64_t chunks_of_unit =
      CeilDiv(params.max_unit_rows, plan.stats_rows) * params.shape.num_chunks;
  const int64_t most = std::min(all_units, kMaxUnitsOfLaunch);
  const int64_t least =
      std::min(most, std::max(portable.units_at_once,
                              CeilDiv(kLeastChunks * device.multiprocessors, chunks_of_unit)));
  plan.units_at_once = UnitsAtOnce(least, std::min(most, 2 * least), all_units, chunks_of_unit,
                                   device.multiprocessors);
  return plan;
}

TensorMapSpec KeyMap(const WindowParams& params, const HopperPlan& plan, int layer,
                     const KeyMemory& memory) {
  const DeviceRows& k = params.shape.k;
  TensorMapSpec spec;
  spec.data = params.layers[layer].k;
  spec.dtype = k.dtype;
  spec.dims[0] = static_cast<uint64_t>(k.head_dim);
  spec.box[0] = kSpanChannels;
  spec.rank = 1;
  for (const Dim& dim : KeyDims(k, IsPaged(params) ? WholeBlocks(k, memory) : 0)) {
    spec.dims[spec.rank] = static_cast<uint64_t>(dim.size);
    spec.stride_bytes[spec.rank] = static_cast<uint64_t>(dim.stride_bytes);
    spec.box[spec.rank] =
        dim.kind == KeyDim::kToken ? static_cast<uint32_t>(plan.keys.box_tokens) : 1u;
    ++spec.rank;
  }
  return spec;
}

cudaError_t LaunchHopperWindowScores(HopperParams params, const HopperPlan& plan,
                                     int multiprocessors, cudaStream_t stream) {
  WindowParams& window = params.window;
  params.keys = plan.keys;
  params.num_parts = static_cast<int32_t>(plan.parts.size());
  const HopperLayout columns_layout(plan.keys.num_spans, plan.columns_capacity, kColumnTokens,
                                    plan.columns_stages);
  const HopperLayout stats_layout(plan.keys.num_spans, plan.stats_rows, plan.stats_tokens,
                                  plan.stats_stages);
  const int64_t tiles = CeilDiv(window.shape.k.num_tokens, kColumnTokens);
  const int64_t row_parts = CeilDiv(window.max_unit_rows, plan.stats_rows);
  const bool is_bf16 = window.shape.k.dtype == DType::kBF16;
  const auto first_part = [&](int64_t unit) {
    return unit / window.num_units * params.num_parts + plan.unit_part[unit % window.num_units];
  };
  LaunchShape rows;
  rows.grid_x = CeilDiv(window.num_rows, kRowWarps);
  rows.grid_y = window.num_layers;
  rows.threads = 32 * kRowWarps;
  window.first_unit = 0;
  cudaError_t error = Launch<PrepareRows>(rows, window, stream);
  rows.grid_x = CeilDiv(window.max_unit_rows, kRowWarps);
  rows.grid_y = 1;
  LaunchShape shape;
  shape.threads = kHopperThreads;
  const int64_t all_units = int64_t{window.num_layers} * window.num_units;
  for (int64_t unit = 0; unit < all_units && error == cudaSuccess; unit += plan.units_at_once) {
    const int64_t count = std::min(plan.units_at_once, all_units - unit);
    window.first_unit = static_cast<int32_t>(unit);
    if (!window.shape.has_lse) {
      params.num_stages = plan.stats_stages;
      params.num_slots = plan.stats_rows;
      params.num_tasks = count * row_parts * window.shape.num_chunks;
      shape.grid_x = std::min<int64_t>(params.num_tasks, multiprocessors);
      shape.shared_bytes = StatsBytes(stats_layout);
      error = is_bf16 ? LaunchRowStats<DType::kBF16>(shape, params, plan.stats_tokens, stream)
                      : LaunchRowStats<DType::kF16>(shape, params, plan.stats_tokens, stream);
      if (error != cudaSuccess) break;
      rows.grid_z = count;
      error = Launch<MergeRowStats>(rows, window, stream);
      if (error != cudaSuccess) break;
    }
    params.num_stages = plan.columns_stages;
    params.num_slots = plan.columns_capacity;
    params.first_part = first_part(unit);
    params.num_tasks = (first_part(unit + count) - params.first_part) * tiles;
    shape.grid_x = std::min<int64_t>(params.num_tasks, multiprocessors);
    shape.shared_bytes = ColumnsBytes(columns_layout);
    error = is_bf16 ? LaunchColumns<DType::kBF16>(shape, params, plan.columns_slots, stream)
                    : LaunchColumns<DType::kF16>(shape, params, plan.columns_slots, stream);
  }
  return error;
}

}  // namespace keepset::kernels::cuda
