// Window scores on the device: the columns of softmax(scale * q k^T) of the observed rows, reduced
// over the rows of each query head. Logits are never stored.
//
// Without a given log-sum-exp there are three launches for some KV heads at a time: RowStats
// (maximum and sum of the exponentials of every row, per chunk of kChunkTokens tokens),
// MergeRowStats (one log-sum-exp per row) and Columns, which computes the logits again while K is
// still in the second-level cache. With a given one, Columns alone. The value norms of the same
// tokens ride along in Columns.
//
// Deterministic: chunks are fixed, partial results are merged in a fixed order, and nothing is
// added atomically.
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

// What all kernels of one call take; all pointers are device memory.
struct WindowParams {
  const std::byte* q = nullptr;  // [H, W, d], at the first used row
  int64_t q_head_bytes = 0;
  int64_t q_row_bytes = 0;
  DType q_dtype = DType::kF32;
  DeviceRows k;                         // [Hkv, T, d]
  int32_t group = 1;                    // query heads per KV head
  int32_t num_rows = 0;                 // used rows of each head
  FastDivider row_divider;              // by num_rows
  int32_t row_base = 0;                 // rows of the call before the first used one
  int32_t all_rows = 0;                 // rows of the call, for the places of faults
  const int32_t* row_limits = nullptr;  // [num_rows]: last position that the row sees, ascending
  float scale2 = 0.0f;                  // softmax_scale * log2(e)
  int32_t padded_dim = 0;               // head_dim rounded up to 16
  int32_t first_kv_head = 0;            // of this launch

  RowStat* partial = nullptr;  // [KV heads of the launch, group * num_rows, num_chunks]
  int32_t num_chunks = 0;
  float* references = nullptr;  // [H, num_rows]: log2-sum-exp2 of each row

  const std::byte* lse = nullptr;  // [H, W] natural log, at the first used row; or null
  int64_t lse_head_bytes = 0;
  DType lse_dtype = DType::kF32;

  float divisor = 1.0f;  // of the sums
  float* out = nullptr;  // [H, T]

  DeviceRows v;                  // [Hkv, T, dv]; data is null when no norms are wanted
  float* value_norms = nullptr;  // [Hkv, T]

  uint64_t* fault = nullptr;        // smallest fault of q, k, logits
  uint64_t* value_fault = nullptr;  // smallest fault of v
};

enum class ColumnReduction { kSum, kMax };

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

template <DType kType, ColumnReduction kReduction>
struct MmaColumns {
  using Params = WindowParams;
  static constexpr int kMaxThreads = 32 * kMaxTileWarps;
  static constexpr int kMinBlocksPerMultiprocessor = 2;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

template <ColumnReduction kReduction>
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
  int64_t kv_heads_at_once = 1;
};

// Tensor cores need 16-bit operands of one type, rows in whole multiples of 16 bytes that begin at
// such, and shared memory for the padded head dimension.
WindowPlan PlanWindow(const WindowParams& params, int64_t max_shared_bytes, int64_t l2_bytes);

// Bytes of `partial` and `references`, each rounded up to 256.
int64_t PartialBytes(const WindowParams& params, const WindowPlan& plan);
int64_t ReferenceBytes(const WindowParams& params);

// Queues the whole call. params.first_kv_head is ignored; partial may be null with a given lse.
cudaError_t LaunchWindowScores(WindowParams params, const WindowPlan& plan,
                               ColumnReduction reduction, cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_WINDOW_SCORES_H_
