// Bounded queue in front of a fixed number of worker threads.
//
// Handlers enqueue, workers run: a full queue is refused at once, with an estimate of when to come
// back. Waiting tasks form flows, an owner's tasks of one size: flows take turns, so that neither
// one owner's flood nor its large prompts stand before everybody else's. Thread-safe. Tasks must
// not throw and must not wait for other tasks of the same queue.
#ifndef KEEPSET_SERVICE_RPC_WORK_QUEUE_H_
#define KEEPSET_SERVICE_RPC_WORK_QUEUE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"

namespace keepset::service {

class WorkQueue {
 public:
  using Task = absl::AnyInvocable<void()>;

  struct Options {
    int num_workers = 2;
    int64_t capacity = 256;                                // tasks waiting
    std::function<void(int64_t waiting)> on_depth_change;  // called under the queue's lock
  };

  struct Flow {
    std::string owner;   // a tenant or session
    int size_class = 0;  // larger: longer tasks
    auto operator<=>(const Flow&) const = default;
  };

  // A worker's place, lent to the thread that took it. Movable, not copyable.
  class Seat {
   public:
    explicit Seat(WorkQueue* queue) : queue_(queue) {}
    Seat(Seat&& other) noexcept : queue_(std::exchange(other.queue_, nullptr)) {}
    Seat& operator=(Seat&&) = delete;
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;
    ~Seat() {
      if (queue_ != nullptr) queue_->LeaveSeat();
    }

   private:
    WorkQueue* queue_;
  };

  // `clock` must outlive the queue.
  static std::unique_ptr<WorkQueue> New(Options options, const Clock& clock);
  // Runs what is queued, then joins.
  virtual ~WorkQueue() = default;

  // ResourceExhausted when `capacity` tasks wait and the flow has some of them; the message ends in
  // "retry in ~N ms". A flow nothing of which waits has room for one task beyond the capacity.
  virtual absl::Status Submit(const Flow& flow, Task task) = 0;
  absl::Status Submit(Task task) { return Submit(Flow(), std::move(task)); }
  // For the next step of work that was admitted before, never refused: behind the tasks of its flow
  // (Continue), or before them (Resume).
  virtual void Continue(const Flow& flow, Task task) = 0;
  void Continue(Task task) { Continue(Flow(), std::move(task)); }
  virtual void Resume(const Flow& flow, Task task) = 0;

  // For work that is shorter than handing it to a worker: the caller may do it itself while it has
  // the seat. nullopt when something waits, no worker is idle or another caller has a seat: callers
  // are threads that others need. The queue must outlive the seat.
  virtual std::optional<Seat> TakeSeat() = 0;

  virtual int64_t waiting() const = 0;
  // Whether a task of this size class or a smaller one waits.
  virtual bool Waits(int up_to_size_class) const = 0;
  // When a refused caller may try again: the time the workers need for half of what waits.
  virtual absl::Duration RetryHint() const = 0;

 private:
  virtual void LeaveSeat() = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_WORK_QUEUE_H_
