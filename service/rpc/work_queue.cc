#include "service/rpc/work_queue.h"

#include <algorithm>
#include <deque>
#include <map>
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

  absl::Status Submit(const Flow& flow, Task task) override {
    absl::MutexLock lock(&mutex_);
    if (waiting_ >= options_.capacity && flows_.contains(flow)) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "queue is full: ", waiting_, " of ", options_.capacity, " operations wait, retry in ~",
          absl::ToInt64Milliseconds(RetryHintLocked()), " ms"));
    }
    TasksOf(flow).push_back(std::move(task));
    CountWaiting(+1);
    return absl::OkStatus();
  }

  void Continue(const Flow& flow, Task task) override {
    absl::MutexLock lock(&mutex_);
    TasksOf(flow).push_back(std::move(task));
    CountWaiting(+1);
  }

  void Resume(const Flow& flow, Task task) override {
    absl::MutexLock lock(&mutex_);
    TasksOf(flow).push_front(std::move(task));
    CountWaiting(+1);
  }

  std::optional<Seat> TakeSeat() override {
    absl::MutexLock lock(&mutex_);
    if (is_seat_taken_ || waiting_ > 0 || running_ >= options_.num_workers) return std::nullopt;
    is_seat_taken_ = true;
    ++running_;
    return Seat(this);
  }

  int64_t waiting() const override {
    absl::MutexLock lock(&mutex_);
    return waiting_;
  }

  bool Waits(int up_to_size_class) const override {
    absl::MutexLock lock(&mutex_);
    return std::any_of(flows_.begin(), flows_.end(),
                       [&](const auto& flow) { return flow.first.size_class <= up_to_size_class; });
  }

  absl::Duration RetryHint() const override {
    absl::MutexLock lock(&mutex_);
    return RetryHintLocked();
  }

 private:
  // A flow that had none takes the last turn.
  std::deque<Task>& TasksOf(const Flow& flow) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto [it, is_new] = flows_.try_emplace(flow);
    if (is_new) turns_.push_back(it);
    return it->second;
  }

  Task TakeNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto flow = turns_.front();
    turns_.pop_front();
    Task task = std::move(flow->second.front());
    flow->second.pop_front();
    if (flow->second.empty()) {
      flows_.erase(flow);
    } else {
      turns_.push_back(flow);
    }
    CountWaiting(-1);
    return task;
  }

  void CountWaiting(int64_t change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    waiting_ += change;
    if (options_.on_depth_change) options_.on_depth_change(waiting_);
  }

  absl::Duration RetryHintLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const double seconds =
        mean_seconds_ * static_cast<double>(waiting_) / (2.0 * std::max(1, options_.num_workers));
    return std::clamp(absl::Seconds(seconds), absl::Milliseconds(1), absl::Seconds(60));
  }

  // A lent seat leaves one place less to the workers.
  bool HasWorkOrStops() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return waiting_ == 0 ? stopping_ : running_ < options_.num_workers;
  }

  void LeaveSeat() override {
    absl::MutexLock lock(&mutex_);
    is_seat_taken_ = false;
    --running_;
  }

  void RunTasks() {
    while (true) {
      Task task;
      {
        absl::MutexLock lock(&mutex_);
        mutex_.Await(absl::Condition(this, &ThreadedWorkQueue::HasWorkOrStops));
        if (waiting_ == 0) return;
        task = TakeNext();
        ++running_;
      }
      const absl::Duration start = clock_.Monotonic();
      task();
      task = nullptr;
      const double seconds = absl::ToDoubleSeconds(clock_.Monotonic() - start);
      absl::MutexLock lock(&mutex_);
      --running_;
      mean_seconds_ += kMeanWeight * (seconds - mean_seconds_);
    }
  }

  const Options options_;
  const Clock& clock_;
  mutable absl::Mutex mutex_;
  using Flows = std::map<Flow, std::deque<Task>>;
  Flows flows_ ABSL_GUARDED_BY(mutex_);  // those with waiting tasks
  std::deque<Flows::iterator> turns_ ABSL_GUARDED_BY(mutex_);
  int64_t waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  int running_ ABSL_GUARDED_BY(mutex_) = 0;  // workers at work, and the seat
  bool is_seat_taken_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  double mean_seconds_ ABSL_GUARDED_BY(mutex_) = 0.010;  // until something was measured
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<WorkQueue> WorkQueue::New(Options options, const Clock& clock) {
  return std::make_unique<ThreadedWorkQueue>(std::move(options), clock);
}

}  // namespace keepset::service
