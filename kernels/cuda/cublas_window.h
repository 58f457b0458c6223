// Window scores with products by cuBLAS: for every type, head dimension and stride, with the rows,
// units, outputs, references, masks and faults of window_scores.h.
//
// The logits of some units, some of their rows and some tokens are written to a workspace of fixed
// size as one strided batch of products, queries [rows, d] by keys [tokens, d] of each KV head;
// from there one kernel takes statistics of rows and another one columns. Without a given
// log-sum-exp that happens twice for a group of units, unless one piece is all of it. Pieces follow
// each other on one stream in a fixed order: statistics and columns of a row are carried from piece
// to piece. Keys that lie in pages, have another type than the queries or overlap are copied next
// to each other first, a piece at a time.
#ifndef KEEPSET_KERNELS_CUDA_CUBLAS_WINDOW_H_
#define KEEPSET_KERNELS_CUDA_CUBLAS_WINDOW_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/cuda/cublas_products.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {

// Of the logits of a piece, and of the copied keys of a piece: both at most.
constexpr int64_t kPieceBytes = int64_t{16} << 20;

// What the kernels take; all pointers are device memory.
struct CublasParams {
  WindowParams window;           // partial: [units of the group, max_unit_rows], of one chunk
  std::byte* queries = nullptr;  // [units, max_unit_rows, padded_dim]
  std::byte* keys = nullptr;     // [units, tokens_at_once, padded_dim] of copied keys
  float* logits = nullptr;       // [units, rows_at_once, tokens_at_once]
  DType dtype = DType::kF32;     // of queries and keys here
  int32_t padded_dim = 0;        // elements; past head_dim they are 0
  int32_t rows_at_once = 0;
  int32_t tokens_at_once = 0;
  // The piece: rows of each unit, and tokens.
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t first_token = 0;
  int32_t num_tokens = 0;
};
static_assert(sizeof(CublasParams) <= 4096);

// Warps of a block that take a row each.
constexpr int kPieceRowWarps = 8;
// Threads of a block of PieceColumns, a token each.
constexpr int kPieceTokens = 128;

// Query rows of the units next to each other, rows past the last of a unit as zeros. One warp per
// row.
struct PackQueries {
  using Params = CublasParams;
  static constexpr int kMaxThreads = 32 * kPieceRowWarps;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Keys of the piece's tokens next to each other. One warp per token.
struct PackKeys {
  using Params = CublasParams;
  static constexpr int kMaxThreads = 32 * kPieceRowWarps;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Adds the piece to the statistics of its rows. One warp per row.
struct PieceStats {
  using Params = CublasParams;
  static constexpr int kMaxThreads = 32 * kPieceRowWarps;
  static constexpr int kMinBlocksPerMultiprocessor = 1;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

// Columns of the piece's tokens; what the piece holds of a row of the result is added to what an
// earlier one left in it. One thread per token, outputs over grid y; value norms with the last
// rows.
struct PieceColumns {
  using Params = CublasParams;
  static constexpr int kMaxThreads = kPieceTokens;
  static constexpr int kMinBlocksPerMultiprocessor = 4;
  template <typename Simt>
  KEEPSET_KERNEL_BODY static void Run(const Simt& simt, const Params& params);
};

enum class KeySource { kWhereTheyLie, kCopied };

// How a call is cut into pieces.
struct CublasPlan {
  DType dtype = DType::kF32;
  KeySource keys = KeySource::kWhereTheyLie;
  int32_t padded_dim = 0;
  int32_t units_at_once = 1;
  int32_t rows_at_once = 1;    // of each unit
  int32_t tokens_at_once = 8;  // a multiple of 8
};

// params: without workspace. InvalidArgument, beginning with `what`, for a head dimension of which
// not even few copied keys fit a piece.
absl::StatusOr<CublasPlan> PlanCublas(const WindowParams& params, absl::string_view what);

// All that a call needs, aligned to 256 bytes.
int64_t CublasWorkspaceBytes(const WindowParams& params, const CublasPlan& plan);

// Queues the whole call. units: the host's copy of params.units.
absl::Status QueueCublasWindowScores(const WindowParams& params, const CublasPlan& plan,
                                     absl::Span<const WindowUnit> units, std::byte* workspace,
                                     LogitProducts& products, DeviceHealth& health,
                                     cudaStream_t stream);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CUBLAS_WINDOW_H_
