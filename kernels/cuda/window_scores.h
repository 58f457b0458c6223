// Window scores on the device: the columns of softmax(scale * q k^T) of observed rows, reduced over
// rows of one query head into each row of the result. Logits are never stored.
//
// What one KV head serves in one layer is a unit: the query rows that meet its keys, and the rows
// of the result that are made of them. Layers of one shape share a launch. Without a given
// log-sum-exp there are three launches for some units at a time: RowStats (maximum and sum of the
// exponentials of every row, per chunk of kChunkTokens tokens), MergeRowStats (one log-sum-exp per
// row) and Columns, which computes the logits again while K is still in the second-level cache.
// With a given one, Columns alone for all units. The value norms of the same tokens ride along in
// Columns.
//
// Deterministic: chunks are fixed, partial results are merged in a fixed order, and nothing is
// added atomically. A row of the result has the same bits alone and in company.
#ifndef KEEPSET_KERNELS_CUDA_WINDOW_SCORES_H_
#define KEEPSET_KERNELS_CUDA_WINDOW_SCORES_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_rows.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/logit_tiles.h"

namespace keepset::kernels::cuda {

// Tokens that one block of RowStats takes. Part of the result: sums are formed per chunk.
constexpr int kChunkTokens = 512;
// Warps of a block of the tensor core kernels, at most.
constexpr int kMaxTileWarps = 8;

// Maximum of the scaled logits of a row (base 2), and the sum of 2^(logit - maximum); -inf and 0
// when the row sees nothing.
struct RowStat {
  float max;
  float sum;
};

enum class ColumnReduction : int32_t { kSum, kMax };

// One observed row of one query head.
struct WindowRow {
  int32_t head = 0;
  int32_t row = 0;
  int32_t limit = 0;  // last position that it sees
};

// One row of the result: a reduction over num_rows rows of the list from first_row on.
struct WindowOutput {
  int32_t out_row = 0;
  int32_t first_row = 0;
  int32_t num_rows = 0;
  ColumnReduction reduction = ColumnReduction::kSum;
  float divisor = 1.0f;  // of the sum
};

struct WindowUnit {
  int32_t kv_head = 0;
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t first_output = 0;
  int32_t num_outputs = 0;
  int32_t smallest_limit = 0;  // of its rows
};

// Memory of one layer; everything on the device.
struct WindowLayer {
  const std::byte* q = nullptr;  // [H, W, d]
  const std::byte* k = nullptr;  // [Hkv, T, d]
  const int32_t* k_table = nullptr;
  const std::byte* lse = nullptr;  // [H, W]; or null
  float* out = nullptr;            // [outputs, T]
  const std::byte* v = nullptr;    // [Hkv, T, dv]; null when no norms are wanted
  const int32_t* v_table = nullptr;
  float* value_norms = nullptr;     // [Hkv, T]
  uint64_t* fault = nullptr;        // smallest fault of q, k, logits
  uint64_t* value_fault = nullptr;  // smallest fault of v
};

// What the layers of a launch have in common.
struct WindowShape {
  DeviceRows k;  // without data and block table
  DeviceRows v;  // the same; all zero when no norms are wanted
  int64_t q_head_bytes = 0;
  int64_t q_row_bytes = 0;
  DType q_dtype = DType::kF32;
  int32_t all_rows = 0;    // rows of each head in q, for the places of faults
  float scale2 = 0.0f;     // softmax_scale * log2(e)
  int32_t padded_dim = 0;  // head_dim rounded up to 16
  int32_t num_chunks = 0;
  bool has_lse = false;
  int64_t lse_head_bytes = 0;
  DType lse_dtype = DType::kF32;
  LogBase lse_base = LogBase::kE;

  bool operator==(const WindowShape&) const = default;
};

// Layers of a launch, at most: their memory is named in the kernel's parameters, of 4 KiB.
constexpr int kMaxWindowLayers = 40;

// What all kernels of one call take; all pointers are device memory.
struct WindowParams {
  WindowShape shape;
  const WindowRow* rows = nullptr;  // [num_rows]
  int32_t num_rows = 0;
  const WindowUnit* units = nullptr;  // [num_units]
  int32_t num_units = 0;              // of one layer
  int32_t max_unit_rows = 0;
  const WindowOutput* outputs = nullptr;
  int32_t num_layers = 0;
  int32_t first_unit = 0;  // of this launch, counted through all layers

  // Statistics that a chunk of a row is given in: RowStats has one, HopperRowStats several.
  int32_t chunk_parts = 1;
  RowStat* partial = nullptr;   // [units of the launch, max_unit_rows, num_chunks, chunk_parts]
  float* references = nullptr;  // [num_layers, num_rows]: log2-sum-exp2 of each row

  WindowLayer layers[kMaxWindowLayers];
};
static_assert(sizeof(WindowParams) <= 4096);

// Checks the query rows, and turns a given log-sum-exp into references. One warp per row.
struct PrepareRows {
  using Params = WindowParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

template <DType kType>
struct MmaRowStats {
  using Params = WindowParams;
  static constexpr int kMaxThreads = 32 * kMaxTileWarps;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

struct FmaRowStats {
  using Params = WindowParams;
  static constexpr int kMaxThreads = FmaTile::kThreads;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// One warp per row: its chunks in a fixed order into one reference.
struct MergeRowStats {
  using Params = WindowParams;
  static constexpr int kMaxThreads = 256;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

template <DType kType>
struct MmaColumns {
  using Params = WindowParams;
  static constexpr int kMaxThreads = 32 * kMaxTileWarps;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

struct FmaColumns {
  using Params = WindowParams;
  static constexpr int kMaxThreads = FmaTile::kThreads;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// How the kernels of one call are arranged.
enum class TileKind { kMma, kFma };

struct WindowPlan {
  TileKind tile = TileKind::kFma;
  int tile_warps = kMaxTileWarps;
  int64_t units_at_once = 1;
};

// Tensor cores need 16-bit operands of one type, rows in whole multiples of 16 bytes that begin at
// such in every layer, and shared memory for the padded head dimension.
WindowPlan PlanWindow(const WindowParams& params, int64_t max_shared_bytes, int64_t l2_bytes);

// Bytes of `partial` and `references`, each rounded up to 256.
int64_t PartialBytes(const WindowParams& params, const WindowPlan& plan);
int64_t ReferenceBytes(const WindowParams& params);

// Queues the whole call. params.first_unit is ignored; partial may be null with a given lse.
cudaError_t LaunchWindowScores(WindowParams params, const WindowPlan& plan, cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_WINDOW_SCORES_H_
