// Execution state of the CUDA backend: a stream with its workspace, small uploads and faults, and
// score buffers in device memory.
//
// Nothing here waits for the device but Wait, and nothing is allocated once the workspace, the
// upload ring and the result buffer have grown to what the operations of a model need.
// Thread-safety: a CudaContext is used by one operation at a time; contexts share the device.
#ifndef KEEPSET_KERNELS_CUDA_CUDA_CONTEXT_H_
#define KEEPSET_KERNELS_CUDA_CUDA_CONTEXT_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "kernels/compute_backend.h"
#include "kernels/cuda/cublas_products.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/tensor_map.h"

namespace keepset::kernels::cuda {

// What becomes of the work of ops.
enum class Execution {
  kQueued,  // on a stream
  kNone,    // it is left out, and no address is looked at: only the memory that ops take counts
};

// What does not change while a backend lives.
struct DeviceTraits {
  Execution execution = Execution::kQueued;
  int ordinal = 0;
  std::string architecture;  // "sm_90"
  int64_t max_shared_bytes = 0;
  int64_t l2_bytes = 0;
  int multiprocessors = 0;
  // Of the Hopper window kernels; null: the portable ones are used.
  TensorMapEncoder tensor_maps = nullptr;
  // Of window kernels "cublas", which take every shape then; else null.
  LogitProducts* products = nullptr;
};

// Which kernels computed window scores.
enum class WindowKernels { kPortable, kHopper, kCublas };
constexpr int kNumWindowKernels = 3;

// Ops with faults between two waits.
constexpr int64_t kMaxFaults = 256;

// Copies of tensors in host memory between two waits, and the share of fixed memory that they may
// take: a further op waits first.
constexpr int64_t kMaxTemporaryBytes = int64_t{256} << 20;
constexpr int64_t kFixedPerTemporary = 4;

// What one stream needs; kept between operations. An operation on its caller's stream borrows it.
class StreamState {
 public:
  StreamState(const DeviceTraits& traits, DeviceHealth& health, DevicePool& pool);
  StreamState(const StreamState&) = delete;
  StreamState& operator=(const StreamState&) = delete;
  ~StreamState();

  // Takes what every op needs, a stream and memory to report faults; before each op, the first of
  // which does the work. An operation that finds no memory for it ends as one that finds none
  // later.
  absl::Status Prepare();
  // Queues everything on `stream` until Reset; null: on its own.
  void Begin(cudaStream_t stream) {
    callers_stream_ = stream;
    deferred_->Open();
  }

  DeviceHealth& health() { return health_; }
  const DeviceTraits& traits() const { return traits_; }
  cudaStream_t stream() const { return callers_stream_ != nullptr ? callers_stream_ : own_stream_; }
  // Null: it is its own.
  cudaStream_t callers_stream() const { return callers_stream_; }

  // Whether work is queued, and there is memory behind the addresses below.
  bool is_queued() const { return traits_.execution == Execution::kQueued; }
  // Queues `work` where work is queued. `name`: of the work, in errors.
  absl::Status Queue(absl::string_view name, absl::FunctionRef<cudaError_t()> work) {
    return is_queued() ? health_.Check(work(), name) : absl::OkStatus();
  }

  // Device memory for one op, aligned to 256 bytes; the next call hands out the same again.
  absl::StatusOr<std::byte*> Workspace(int64_t bytes);
  // Device memory of its own until the next Wait.
  absl::StatusOr<std::byte*> Temporary(int64_t bytes);
  // Queues a copy of a few bytes of host memory, which may change afterwards; the device memory is
  // valid until the next Wait.
  absl::StatusOr<const std::byte*> Upload(const void* data, int64_t bytes);
  // Room for uploads of `bytes`, alignment included, between this call and the next Wait and
  // between any two waits after it, until Reset. Waits.
  absl::Status ReserveUploads(int64_t bytes);
  static constexpr int64_t kUploadAlignment = 256;
  // At least `bytes` of device memory at kept(), until Reset, which a larger piece replaces.
  // Nothing that is queued uses the one before.
  absl::Status Keep(int64_t bytes);
  absl::Span<std::byte> kept() const {
    return absl::MakeSpan(kept_.data(), static_cast<size_t>(kept_.bytes()));
  }
  // Page-locked memory for results; the next call hands out the same again.
  absl::StatusOr<std::byte*> Results(int64_t bytes);
  // Room for `count` faults, at most kMaxFaults, and for temporary memory, by an early wait when
  // need be: before an op stages or uploads anything.
  absl::Status ReserveFaults(int64_t count);
  // Whether temporary memory is to be freed by a wait before more is asked for.
  bool has_many_temporaries() const { return temporary_bytes_ > most_temporary_bytes_; }
  // Where a kernel reports the smallest fault code; `describe` turns it into the error of the next
  // Wait. Reserved before.
  uint64_t* NewFault(std::function<absl::Status(uint64_t code)> describe);

  // Remembers, until Reset, that kernels of this kind were queued.
  void NoteWindowKernels(WindowKernels kernels) { used_[static_cast<int>(kernels)] = true; }
  bool HasUsed(WindowKernels kernels) const { return used_[static_cast<int>(kernels)]; }

  // Waits for the stream; returns the error of the oldest op that reported a fault.
  absl::Status Wait();

  const std::shared_ptr<DeferredBlocks>& deferred() const { return deferred_; }
  // Waits, and forgets what the operation left and whose stream it was. On an error it is of no
  // more use, and its memory may still be worked on.
  absl::Status Reset();
  // Gives the memory to nobody: what a stream that cannot be waited for works on.
  void Abandon();

 private:
  absl::Status NewOwnStream();
  int64_t ring_bytes() const;
  absl::Status GrowRing(int64_t bytes);
  absl::Status TakeFaults();
  // Page-locked memory that no queued copy reads.
  absl::StatusOr<std::unique_ptr<PinnedBuffer>> TakeRingHost(int64_t bytes);
  // Nothing is in the ring.
  void PutRingAway();
  // The stream is idle.
  absl::Status ReadFaults();
  void ForgetQueued();

  const DeviceTraits& traits_;
  DeviceHealth& health_;
  DevicePool& pool_;
  const int64_t most_temporary_bytes_;
  cudaStream_t own_stream_ = nullptr;
  cudaStream_t callers_stream_ = nullptr;
  DeviceBlock workspace_;
  DeviceBlock kept_;
  DeviceBlock ring_;  // uploads, and their copies on the host
  std::unique_ptr<PinnedBuffer> ring_host_;
  std::vector<std::unique_ptr<PinnedBuffer>> old_rings_;  // queued copies may still read them
  // Of earlier operations, for the rings of later ones, which begin small again where memory is
  // fixed.
  std::vector<std::unique_ptr<PinnedBuffer>> spare_rings_;
  int64_t ring_used_ = 0;
  int64_t temporary_bytes_ = 0;  // since the last wait
  PinnedBuffer results_;
  DeviceBlock faults_;
  PinnedBuffer faults_host_;
  std::vector<std::function<absl::Status(uint64_t)>> describe_;
  std::array<bool, kNumWindowKernels> used_ = {};  // by WindowKernels
  absl::Status pending_;                           // found before the next Wait was called
  std::shared_ptr<DeferredBlocks> deferred_ = std::make_shared<DeferredBlocks>();
};

// States that no operation uses. Thread-safe.
class StreamPool {
 public:
  StreamPool(const DeviceTraits& traits, DeviceHealth& health, DevicePool& pool)
      : traits_(traits), health_(health), pool_(pool) {}

  // Begun on `stream`, the caller's, or on its own where that is null.
  std::unique_ptr<StreamState> Acquire(cudaStream_t stream);
  void Release(std::unique_ptr<StreamState> state);

 private:
  // Null when there is none.
  std::unique_ptr<StreamState> TakeIdle();

  const DeviceTraits& traits_;
  DeviceHealth& health_;
  DevicePool& pool_;
  absl::Mutex mutex_;
  std::vector<std::unique_ptr<StreamState>> idle_ ABSL_GUARDED_BY(mutex_);
};

class CudaContext : public OpContext {
 public:
  CudaContext(StreamPool* streams, std::unique_ptr<StreamState> state)
      : streams_(streams), state_(std::move(state)) {}
  ~CudaContext() override { streams_->Release(std::move(state_)); }

  StreamState& state() { return *state_; }
  const StreamState& state() const { return *state_; }

 private:
  StreamPool* streams_;
  std::unique_ptr<StreamState> state_;
};

class CudaScoreBuffer : public ScoreBuffer {
 public:
  CudaScoreBuffer(DeviceBlock block, int64_t rows, int64_t cols)
      : block_(std::move(block)), rows_(rows), cols_(cols) {}
  ~CudaScoreBuffer() override;

  float* data() override { return reinterpret_cast<float*>(block_.data()); }
  const float* data() const override { return reinterpret_cast<const float*>(block_.data()); }
  int64_t rows() const override { return rows_; }
  int64_t cols() const override { return cols_; }
  int64_t bytes() const { return rows_ * cols_ * int64_t{sizeof(float)}; }

  // For an op on the stream that reads or changes some of it: a buffer that nobody wrote is zeros.
  absl::StatusOr<float*> Use(StreamState& state);
  // For an op that writes all of it.
  float* Overwrite(StreamState& state);

 private:
  DeviceBlock block_;
  const int64_t rows_;
  const int64_t cols_;
  bool is_written_ = false;
  std::shared_ptr<DeferredBlocks> last_stream_;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CUDA_CONTEXT_H_
