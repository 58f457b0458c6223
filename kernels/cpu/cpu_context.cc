#include "kernels/cpu/cpu_context.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "tbb/blocked_range.h"
#include "tbb/info.h"
#include "tbb/parallel_for.h"
#include "tbb/partitioner.h"
#include "tbb/task_arena.h"
#include "tbb/task_group.h"

#if defined(__SANITIZE_THREAD__)
#define KEEPSET_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KEEPSET_THREAD_SANITIZER 1
#endif
#endif
#if !defined(KEEPSET_THREAD_SANITIZER)
#define KEEPSET_THREAD_SANITIZER 0
#endif

namespace keepset::kernels::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int64_t kHugePageBytes = int64_t{2} << 20;
// The exponentials of a prompt beyond some 16k tokens. malloc gives memory of that size back to the
// system sooner or later, and every new context pays for its pages again; smaller sizes it keeps,
// and there the larger alignment measured slower (window_scores_bench, 1024 tokens).
constexpr int64_t kHugeBytes = int64_t{16} << 20;

class SerialArena : public ThreadArena {
 public:
  int num_threads() const override { return 1; }
  void ParallelFor(int64_t num_tasks, absl::FunctionRef<void(int64_t task, int slot)> fn) override {
    for (int64_t task = 0; task < num_tasks; ++task) fn(task, 0);
  }
};

#if KEEPSET_THREAD_SANITIZER

// ThreadSanitizer cannot see the synchronisation inside the TBB library and would report every
// task. Plain threads let it check what the ops themselves share.
class PlainThreadArena : public ThreadArena {
 public:
  explicit PlainThreadArena(int num_threads) : num_threads_(num_threads) {}

  int num_threads() const override { return num_threads_; }
  void ParallelFor(int64_t num_tasks, absl::FunctionRef<void(int64_t task, int slot)> fn) override {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    for (int slot = 0; slot < num_threads_; ++slot) {
      threads.emplace_back([&, slot] {
        for (int64_t task = next++; task < num_tasks; task = next++) fn(task, slot);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  const int num_threads_;
};

using ParallelArena = PlainThreadArena;

#else

class TbbArena : public ThreadArena {
 public:
  explicit TbbArena(int num_threads) : num_threads_(num_threads), arena_(num_threads) {}

  int num_threads() const override { return num_threads_; }
  void ParallelFor(int64_t num_tasks, absl::FunctionRef<void(int64_t task, int slot)> fn) override {
    arena_.execute([&] {
      // Isolated: a cancelled group of the caller must not leave results half computed.
      tbb::task_group_context context(tbb::task_group_context::isolated);
      tbb::parallel_for(
          tbb::blocked_range<int64_t>(0, num_tasks, 1),
          [&](const tbb::blocked_range<int64_t>& range) {
            const int slot = tbb::this_task_arena::current_thread_index();
            for (int64_t task = range.begin(); task < range.end(); ++task) fn(task, slot);
          },
          tbb::simple_partitioner(), context);
    });
  }

 private:
  const int num_threads_;
  tbb::task_arena arena_;
};

using ParallelArena = TbbArena;

#endif  // KEEPSET_THREAD_SANITIZER

}  // namespace

absl::Status AlignedBuffer::Reserve(int64_t bytes) {
  if (bytes <= capacity_) return absl::OkStatus();
  data_.reset();
  capacity_ = 0;
  const bool is_huge = bytes >= kHugeBytes;
  const std::align_val_t alignment = is_huge ? std::align_val_t{kHugePageBytes} : kAlignment;
  void* memory = ::operator new(static_cast<size_t>(bytes), alignment, std::nothrow);
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes"));
  }
  data_ = std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(memory), Free{alignment});
  // Only advice: where it is refused the memory serves as well, with more page faults.
  if (is_huge) (void)madvise(memory, bytes / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
  capacity_ = bytes;
  return absl::OkStatus();
}

std::unique_ptr<ThreadArena> NewThreadArena(int num_threads) {
  if (num_threads <= 1) return std::make_unique<SerialArena>();
  return std::make_unique<ParallelArena>(num_threads);
}

int NumUsableCores() { return std::max(1, tbb::info::default_concurrency()); }

CpuContext::CpuContext(ThreadArena* arena)
    : arena_(arena),
      shared_(static_cast<size_t>(SharedScratch::kCount)),
      slots_(static_cast<size_t>(SlotScratch::kCount) * arena->num_threads()) {}

absl::Status CpuContext::TryParallelFor(
    int64_t num_tasks, absl::FunctionRef<absl::Status(int64_t task, int slot)> fn) {
  absl::Mutex mutex;
  absl::Status first;
  int64_t first_task = num_tasks;
  arena_->ParallelFor(num_tasks, [&](int64_t task, int slot) {
    absl::Status status = fn(task, slot);
    if (status.ok()) return;
    absl::MutexLock lock(&mutex);
    if (task < first_task) {
      first_task = task;
      first = std::move(status);
    }
  });
  return first;
}

absl::Status CpuContext::ReserveSlots(SlotScratch use, int64_t bytes) {
  for (int i = 0; i < num_slots(); ++i) KEEPSET_RETURN_IF_ERROR(slot(i, use).Reserve(bytes));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ScoreBuffer>> CpuScoreBuffer::New(int64_t rows, int64_t cols) {
  int64_t bytes = 0;
  if (rows < 1 || cols < 1 || __builtin_mul_overflow(rows, cols, &bytes) ||
      __builtin_mul_overflow(bytes, int64_t{sizeof(float)}, &bytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat("score buffer [", rows, ", ", cols, "], want positive sizes within 64 bits"));
  }
  constexpr auto kAlign = static_cast<size_t>(kAlignment);
  const size_t allocated = static_cast<size_t>(bytes) + kAlign;
  std::unique_ptr<void, Free> memory(std::calloc(allocated, 1));
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes"));
  }
  void* aligned = memory.get();
  size_t space = allocated;
  std::align(kAlign, static_cast<size_t>(bytes), aligned, space);
  return std::unique_ptr<ScoreBuffer>(
      new CpuScoreBuffer(std::move(memory), static_cast<float*>(aligned), rows, cols));
}

}  // namespace keepset::kernels::cpu
