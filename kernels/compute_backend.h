// The numeric operations of Keepset behind one interface. Each op exists once per backend; the CPU
// backend is the oracle of the others.
//
// Memory: operands that policies compute on ("scores") live in ScoreBuffers of the backend (host
// memory on the CPU, device memory on a GPU). Engine and policies never dereference them;
// CopyToHost does. Threads: one backend serves many operations at the same time. An OpContext
// belongs to one operation and is used by one thread at a time. Order: ops of one context run in
// order. On a GPU they are queued on the context's stream; Wait and every function that returns
// values to the host wait for it. Errors found on the device (a NaN in K) are reported by the next
// Wait. The CPU backend works synchronously and reports at once. Determinism: same inputs, same
// bits, for any number of threads. Errors: InvalidArgument for non-finite values of valid
// positions, naming `what` and position.
#ifndef KEEPSET_KERNELS_COMPUTE_BACKEND_H_
#define KEEPSET_KERNELS_COMPUTE_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/views.h"

namespace keepset::kernels {

// fp32 values owned by a backend, row-major [rows, cols].
class ScoreBuffer {
 public:
  virtual ~ScoreBuffer() = default;
  virtual float* data() = 0;  // Host pointer on the CPU, device pointer on a GPU.
  virtual const float* data() const = 0;
  virtual int64_t rows() const = 0;
  virtual int64_t cols() const = 0;
};

// Per-operation execution state: a stream and its workspace on a GPU, a thread arena on the CPU.
class OpContext {
 public:
  virtual ~OpContext() = default;
};

// What a new OpContext is to be.
struct ContextOptions {
  // A cudaStream_t of the backend's device, not in capture, on which the context's ops are queued;
  // its owner keeps it, out of capture, while the context lives. nullptr: one of the backend's own.
  void* stream = nullptr;
};

// How the observed rows of one query head become one value per position.
enum class RowReduction { kMean, kSum, kMax, kLast };
// How query heads of a group, KV heads or layers are merged.
enum class Merge { kMean, kMax, kSum };
enum class PoolKind { kAverage, kMax };

// Some of the observed rows of one query head, and how they become one value per position.
struct HeadRows {
  int64_t head = 0;       // as q, window_lse and tile list them
  int64_t first_row = 0;  // index into the W rows
  int64_t num_rows = 0;
  RowReduction reduction = RowReduction::kMean;
  // Whose keys it reads, for queries that do not hold every head: all of a list say it, in
  // ascending order, or none. -1: `head` divided by the heads of a group.
  int64_t kv_head = -1;

  bool operator==(const HeadRows&) const = default;
};

struct WindowArgs {
  QueryView q;  // [H, W, d]
  KvView k;     // [Hkv, T, d]
  // [W] ascending; row i sees t <= row_positions[i], and every position when that is T or more.
  absl::Span<const int64_t> row_positions;
  LseView window_lse;  // Optional: [H, W]; halves the work.
  float softmax_scale = 0.0f;
  RowReduction reduction = RowReduction::kMean;
  absl::string_view what;  // Prefix of error messages, for example "layer 3".
  // Optional: [Hkv, T] receives the RowNorms of v, which a backend may read along with k.
  KvView v;  // [Hkv, T, dv]
  ScoreBuffer* value_norms = nullptr;
  // Not empty: only these, row j of out for heads[j], `reduction` aside. Ordered by head. K of a KV
  // head is read once for all its listed heads, and not at all when none is listed.
  absl::Span<const HeadRows> heads;
};

struct TileArgs {
  TileView tile;                            // [H, W, T]
  absl::Span<const int64_t> row_positions;  // [W]; entries at t > row_positions[i] are ignored
  RowReduction reduction = RowReduction::kMean;
  absl::string_view what;
  absl::Span<const HeadRows> heads;  // as in WindowArgs
  // What kMean divides by; 0: the rows it added. A tile of one row that is a sum over W rows says
  // W.
  int64_t mean_rows = 0;
  absl::string_view tensor = "attn_tile";  // its name in error messages
};

// How a row of scores is brought to a common scale.
enum class Normalization {
  kMax,          // divided by its maximum
  kSum,          // divided by its sum
  kStandardize,  // minus its mean, divided by its standard deviation
};

// Which positions of a row of scores are chosen.
struct SelectArgs {
  // Positions that are always kept and count against budget; ascending, disjoint [begin, end).
  struct Range {
    int64_t begin = 0;
    int64_t end = 0;
  };
  absl::Span<const Range> protected_ranges;
  int64_t budget = 0;                                         // positions to keep at most
  float threshold = -std::numeric_limits<float>::infinity();  // candidates have score >= threshold
  // At least min(min_kept, budget) positions stay, below the threshold when need be.
  int64_t min_kept = 0;
};

// The rows of one buffer that are cut together.
struct SelectTask {
  const ScoreBuffer* scores = nullptr;
  absl::Span<const SelectArgs> args;  // one entry per row, or one for all
};

struct Selection {
  std::vector<int32_t> keep_indices;  // ascending
  int64_t candidates = 0;             // positions with score >= threshold, protected or not
  int64_t filled = 0;                 // kept although below the threshold and not protected
};

// Rows of one tensor that are copied together.
struct GatherTask {
  KvView in;
  absl::Span<const absl::Span<const int32_t>> keep_indices;
  MutableKvView out;
  absl::string_view what;  // Prefix of error messages, for example "layer 3: gather of k".
};

// Rows of one tensor that move within it.
struct CompactTask {
  absl::Span<const absl::Span<const int32_t>> keep_indices;
  MutableKvView x;
};

// The device that a backend computes on; all empty for host memory.
struct DeviceInfo {
  std::string uuid;  // "GPU-..." as the driver's tools print it
  std::string name;
  std::string driver_version;      // CUDA version that the driver supports
  std::string compute_capability;  // "9.0"
  int64_t memory_bytes = 0;
  std::string note;  // what an operator should know of it; mostly empty
};

// Device memory of a backend for ops and score buffers; all 0 for host memory.
struct DeviceMemoryUse {
  int64_t reserved_bytes = 0;  // allocated
  int64_t used_bytes = 0;      // of it, by ops and buffers
  // The most that was used at a time; of memory of a fixed size, how much of it would have done.
  int64_t peak_bytes = 0;
};

class ComputeBackend {
 public:
  virtual ~ComputeBackend() = default;

  // "cpu/avx512", "cpu/avx2", "cuda/sm_90" ...: what results report as the backend.
  virtual std::string name() const = 0;
  // The same for what an operation has queued so far, with the variant that computed it where a
  // backend has several: "cuda/sm_90/wgmma".
  virtual std::string NameFor(const OpContext& /*context*/) const { return name(); }

  virtual DeviceInfo Device() const { return {}; }

  virtual DeviceMemoryUse MemoryUse() const { return {}; }

  // A backend that takes of a device memory it does not have, step by step, what this one would
  // take of memory of a fixed size: its MemoryUse().peak_bytes says how much that is. Its ops check
  // their operands as this one's, compute nothing and look behind no pointer, which all count as
  // device memory. Values that reach the host are 1, every Selection is as long as it may be.
  // nullptr: ops of this backend take no device memory. This one must outlive it.
  virtual std::unique_ptr<ComputeBackend> NewMeasure() const { return nullptr; }

  // OK, or the error after which the device answers nothing until the process is restarted.
  virtual absl::Status Health() const { return absl::OkStatus(); }

  // InvalidArgument for a stream of another device, one that the runtime does not know, or where
  // the backend has none; FailedPrecondition for one that is captured into a graph.
  virtual absl::StatusOr<std::unique_ptr<OpContext>> NewContext(const ContextOptions& options) = 0;
  absl::StatusOr<std::unique_ptr<OpContext>> NewContext() { return NewContext(ContextOptions()); }
  // How many layers of an operation gain by being queued before one Wait; 1: none does.
  virtual int64_t layers_at_once() const { return 1; }

  // Zero-filled.
  virtual absl::StatusOr<std::unique_ptr<ScoreBuffer>> NewBuffer(int64_t rows, int64_t cols) = 0;

  // out[h, t] = reduction over rows i of softmax_t(scale * q[h,i].k[h/G,t]) masked to
  // t <= row_positions[i]; rows that do not see t contribute 0 (and are counted in the mean's W).
  // methods.md 0.1. out: [H, T], or [heads.size(), T] with args.heads.
  virtual absl::Status WindowColumns(OpContext& context, const WindowArgs& args,
                                     ScoreBuffer& out) = 0;
  // WindowColumns of layers[i] into outs[i], for every i. A device takes layers of one shape
  // together; results are those of one call per layer, and the first refused layer is reported.
  virtual absl::Status WindowColumnsOfLayers(OpContext& context,
                                             absl::Span<const WindowArgs> layers,
                                             absl::Span<ScoreBuffer* const> outs);
  // The same from a given tile. Values must be finite and >= 0.
  virtual absl::Status TileColumns(OpContext& context, const TileArgs& args, ScoreBuffer& out) = 0;

  // out[g, t] = || x[g, t, :] ||_2 in fp32. out: [Hkv, T].
  virtual absl::Status RowNorms(OpContext& context, const KvView& x, absl::string_view what,
                                ScoreBuffer& out) = 0;

  // out[j, t] = -cos(k[h, t, :], m_h) of KV head h = kv_heads[j], m_h the mean over t of the keys
  // scaled to unit length (methods.md 4.13); the cosine with a zero vector is 0. Other KV heads are
  // not read. out: [kv_heads.size(), T].
  virtual absl::Status KeyNovelty(OpContext& context, const KvView& k,
                                  absl::Span<const int64_t> kv_heads, absl::string_view what,
                                  ScoreBuffer& out) = 0;

  // Scales every row by what it is outside `excluded` (ascending, disjoint); excluded positions are
  // scaled as well. A row whose maximum, sum or deviation there is not above 0 becomes 0.
  virtual absl::Status NormalizeRows(OpContext& context, Normalization normalization,
                                     absl::Span<const SelectArgs::Range> excluded,
                                     ScoreBuffer& x) = 0;

  // x[r, t] /= max(eps, mean_t x[r, t]) for every row (methods.md 1.1 step 2).
  virtual absl::Status DivideByRowMean(OpContext& context, float eps, ScoreBuffer& x) = 0;

  // out[r, t] = merge over the `in.rows()/out.rows()` consecutive rows of in, each multiplied by
  // weights[row] when weights is not empty ([in.rows()]).
  virtual absl::Status MergeRows(OpContext& context, const ScoreBuffer& in, Merge merge,
                                 absl::Span<const float> weights, ScoreBuffer& out) = 0;

  // acc[r, t] = op(acc[r, t], weight * x[r, t]); kMean and kSum add, kMax takes the maximum.
  virtual absl::Status Accumulate(OpContext& context, const ScoreBuffer& x, Merge merge,
                                  float weight, ScoreBuffer& acc) = 0;

  // x[r, t] *= y[r or 0, t] * factor. y has x.rows() rows or one row.
  virtual absl::Status Multiply(OpContext& context, const ScoreBuffer& y, float factor,
                                ScoreBuffer& x) = 0;

  // 1-D pooling along t of positions [0, length): stride 1, kernel odd, zero padding counted in the
  // average (methods.md 4.1 step 7). Positions >= length are left alone. In place.
  virtual absl::Status Pool(OpContext& context, PoolKind kind, int64_t kernel, int64_t length,
                            ScoreBuffer& x) = 0;

  // x[r, t] = max_{0 <= j <= dilate} x[r, t - j]: a hit also keeps the positions after it. In
  // place.
  virtual absl::Status DilateForward(OpContext& context, int64_t dilate, ScoreBuffer& x) = 0;

  // x[r, t] = value for t in [begin, end), all rows.
  virtual absl::Status Fill(OpContext& context, int64_t begin, int64_t end, float value,
                            ScoreBuffer& x) = 0;

  // Entropy in nats of row 0 of x normalised by its sum: -sum p ln max(p, 1e-8); and the sum
  // itself. Waits. InvalidArgument when the sum is not finite or not positive. methods.md 1.1
  // step 5.
  struct Mass {
    double entropy = 0.0;
    double sum = 0.0;
  };
  virtual absl::StatusOr<Mass> MassAndEntropy(OpContext& context, const ScoreBuffer& x,
                                              int64_t row) = 0;
  // The same of row 0 of each: one wait on a device.
  virtual absl::StatusOr<std::vector<Mass>> MassAndEntropyOfEach(
      OpContext& context, absl::Span<const ScoreBuffer* const> buffers);

  // One Selection per row of scores: protected positions first, then the highest scores among the
  // candidates (score >= threshold), ties to the lower position, until `budget`. Waits.
  // `args` has one entry per row, or one for all. Exact, no sort. Scores must not be NaN.
  virtual absl::StatusOr<std::vector<Selection>> Select(OpContext& context,
                                                        const ScoreBuffer& scores,
                                                        absl::Span<const SelectArgs> args) = 0;

  // Select of every task, in order: one launch and one wait on a device.
  virtual absl::StatusOr<std::vector<std::vector<Selection>>> SelectEach(
      OpContext& context, absl::Span<const SelectTask> tasks);

  // out[g, i, :] = in[g, keep_indices[i], :], bit for bit. One shared set for all heads, or one set
  // per KV head (`keep_indices.size() == num_kv_heads`; rows beyond a head's own count stay
  // untouched). `out.seq_len` is the capacity; too small is InvalidArgument. in and out must not
  // overlap. Waits.
  virtual absl::Status GatherRows(OpContext& context, const KvView& in,
                                  absl::Span<const absl::Span<const int32_t>> keep_indices,
                                  const MutableKvView& out) = 0;

  // Takes the memory for CompactRows of each of `tasks`, one after the other, and keeps it until
  // the context ends: they ask for no more then. Refuses what CompactRows refuses. Moves nothing;
  // ResourceExhausted when there is not so much. May wait.
  virtual absl::Status ReserveCompaction(OpContext& context,
                                         absl::Span<const CompactTask> tasks) = 0;

  // x[g, i, :] = x[g, keep_indices[i], :] of before, bit for bit: GatherRows within one tensor.
  // Sets are strictly ascending; rows at or behind a head's count are not written. InvalidArgument
  // and ResourceExhausted, the latter only without a reservation: nothing has moved; after any
  // other error x may be half moved. Waits.
  virtual absl::Status CompactRows(OpContext& context,
                                   absl::Span<const absl::Span<const int32_t>> keep_indices,
                                   const MutableKvView& x) = 0;

  // GatherRows of every task: one launch and one wait on a device, where sources and destinations
  // are in its memory. No destination overlaps a source or another destination. On a device,
  // InvalidArgument: nothing has moved; after any other error some tasks may have been.
  virtual absl::Status GatherRowsOfEach(OpContext& context, absl::Span<const GatherTask> tasks);

  // Copies rows x cols floats to host memory; waits.
  virtual absl::Status CopyToHost(OpContext& context, const ScoreBuffer& x,
                                  absl::Span<float> out) = 0;
  // Copies host floats into the buffer.
  virtual absl::Status CopyFromHost(OpContext& context, absl::Span<const float> in,
                                    ScoreBuffer& out) = 0;

  // Waits for the context's queued ops and reports what they found.
  virtual absl::Status Wait(OpContext& context) = 0;
};

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_COMPUTE_BACKEND_H_
