#include "service/rpc/work_queue.h"

#include <algorithm>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

namespace keepset::service {
namespace {

// Weight of the newest task in the running mean of task durations.
constexpr double kMeanWeight = 0.1;

class ThreadedWorkQueue final : public WorkQueue {
 public:
  ThreadedWorkQueue(Options options, const Clock& clock)
      : options_(std::move(options)), clock_(clock) {
    for (int i = 0; i < options_.num_workers; ++i) {
      threads_.emplace_back([this] { RunTasks(); });
    }
  }

  ~ThreadedWorkQueue() override {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
    }
    for (std::thread& thread : threads_) thread.join();
  }

  absl::Status Submit(Task task) override {
    absl::MutexLock lock(&mutex_);
    if (static_cast<int64_t>(tasks_.size()) >= options_.capacity) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "queue is full: ", tasks_.size(), " of ", options_.capacity,
          " operations wait, retry in ~", absl::ToInt64Milliseconds(RetryHintLocked()), " ms"));
    }
    Push(std::move(task));
    return absl::OkStatus();
  }

  void Continue(Task task) override {
    absl::MutexLock lock(&mutex_);
    Push(std::move(task));
  }

  int64_t waiting() const override {
    absl::MutexLock lock(&mutex_);
    return static_cast<int64_t>(tasks_.size());
  }

  absl::Duration RetryHint() const override {
    absl::MutexLock lock(&mutex_);
    return RetryHintLocked();
  }

 private:
  void Push(Task task) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    tasks_.push_back(std::move(task));
    ReportDepth();
  }

  void ReportDepth() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (options_.on_depth_change) {
      options_.on_depth_change(static_cast<int64_t>(tasks_.size()));
    }
  }

  absl::Duration RetryHintLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const double seconds = mean_seconds_ * static_cast<double>(tasks_.size()) /
                           (2.0 * std::max(1, options_.num_workers));
    return std::clamp(absl::Seconds(seconds), absl::Milliseconds(1), absl::Seconds(60));
  }

  bool HasWorkOrStops() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !tasks_.empty();
  }

  void RunTasks() {
    while (true) {
      Task task;
      {
        absl::MutexLock lock(&mutex_);
        mutex_.Await(absl::Condition(this, &ThreadedWorkQueue::HasWorkOrStops));
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
        ReportDepth();
      }
      const absl::Duration start = clock_.Monotonic();
      task();
      task = nullptr;
      const double seconds = absl::ToDoubleSeconds(clock_.Monotonic() - start);
      absl::MutexLock lock(&mutex_);
      mean_seconds_ += kMeanWeight * (seconds - mean_seconds_);
    }
  }

  const Options options_;
  const Clock& clock_;
  mutable absl::Mutex mutex_;
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  double mean_seconds_ ABSL_GUARDED_BY(mutex_) = 0.010;  // until something was measured
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<WorkQueue> WorkQueue::New(Options options, const Clock& clock) {
  return std::make_unique<ThreadedWorkQueue>(std::move(options), clock);
}

}  // namespace keepset::service
