// Execution state of the CPU backend: score buffers in host memory, the scratch memory of one
// operation and its way into the backend's threads.
//
// Thread-safety: a CpuContext is used by one operation at a time; contexts share the arena.
#ifndef KEEPSET_KERNELS_CPU_CPU_CONTEXT_H_
#define KEEPSET_KERNELS_CPU_CPU_CONTEXT_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/compute_backend.h"

namespace keepset::kernels::cpu {

// Grow-only memory aligned to a cache line; large sizes are aligned to a huge page and advised to
// be huge pages.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;

  // At least `bytes`; the content is lost when it grows. ResourceExhausted when memory is refused.
  absl::Status Reserve(int64_t bytes);

  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(std::byte* data) const { ::operator delete(data, alignment); }
  };
  std::unique_ptr<std::byte, Free> data_;
  int64_t capacity_ = 0;
};

// What the ops use scratch memory for; each purpose grows to the largest use.
enum class SharedScratch { kExponentials, kQueries, kRowStats, kTasks, kCount };
enum class SlotScratch { kPanels, kStaging, kLogits, kPointers, kExponentials, kCount };

class ThreadArena {
 public:
  virtual ~ThreadArena() = default;
  virtual int num_threads() const = 0;
  // Calls fn(task, slot) once for each task of [0, num_tasks). Two calls that run at the same time
  // have different slots in [0, num_threads).
  virtual void ParallelFor(int64_t num_tasks,
                           absl::FunctionRef<void(int64_t task, int slot)> fn) = 0;
};

// num_threads >= 1.
std::unique_ptr<ThreadArena> NewThreadArena(int num_threads);

// Cores that this process may use.
int NumUsableCores();

class CpuContext : public OpContext {
 public:
  explicit CpuContext(ThreadArena* arena);

  int num_slots() const { return arena_->num_threads(); }
  void ParallelFor(int64_t num_tasks, absl::FunctionRef<void(int64_t task, int slot)> fn) {
    arena_->ParallelFor(num_tasks, fn);
  }
  // Runs the tasks, and returns the error of the lowest failed task.
  absl::Status TryParallelFor(int64_t num_tasks,
                              absl::FunctionRef<absl::Status(int64_t task, int slot)> fn);

  AlignedBuffer& shared(SharedScratch use) { return shared_[static_cast<size_t>(use)]; }
  AlignedBuffer& slot(int slot, SlotScratch use) {
    return slots_[slot * static_cast<size_t>(SlotScratch::kCount) + static_cast<size_t>(use)];
  }
  // Reserves `bytes` for `use` in every slot.
  absl::Status ReserveSlots(SlotScratch use, int64_t bytes);

 private:
  ThreadArena* arena_;
  std::vector<AlignedBuffer> shared_;
  std::vector<AlignedBuffer> slots_;
};

// Memory comes from calloc, which leaves large sizes to the kernel's zero pages: an operation that
// announces a long prompt holds no memory before its tensors arrive.
class CpuScoreBuffer : public ScoreBuffer {
 public:
  static absl::StatusOr<std::unique_ptr<ScoreBuffer>> New(int64_t rows, int64_t cols);

  float* data() override { return data_; }
  const float* data() const override { return data_; }
  int64_t rows() const override { return rows_; }
  int64_t cols() const override { return cols_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  CpuScoreBuffer(std::unique_ptr<void, Free> memory, float* data, int64_t rows, int64_t cols)
      : memory_(std::move(memory)), data_(data), rows_(rows), cols_(cols) {}

  std::unique_ptr<void, Free> memory_;
  float* data_;  // within memory_, aligned to a cache line
  int64_t rows_;
  int64_t cols_;
};

}  // namespace keepset::kernels::cpu

#endif  // KEEPSET_KERNELS_CPU_CPU_CONTEXT_H_
