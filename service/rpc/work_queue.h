// Bounded queue in front of a fixed number of worker threads.
//
// Handlers enqueue, workers run: a full queue is refused at once, with an estimate of when to come
// back. Thread-safe. Tasks must not throw and must not wait for other tasks of the same queue.
#ifndef KEEPSET_SERVICE_RPC_WORK_QUEUE_H_
#define KEEPSET_SERVICE_RPC_WORK_QUEUE_H_

#include <cstdint>
#include <functional>
#include <memory>

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

  // `clock` must outlive the queue.
  static std::unique_ptr<WorkQueue> New(Options options, const Clock& clock);
  // Runs what is queued, then joins.
  virtual ~WorkQueue() = default;

  // ResourceExhausted when `capacity` tasks wait; the message ends in "retry in ~N ms".
  virtual absl::Status Submit(Task task) = 0;
  // For the next step of work that was admitted before: never refused.
  virtual void Continue(Task task) = 0;

  virtual int64_t waiting() const = 0;
  // When a refused caller may try again: the time the workers need for half of what waits.
  virtual absl::Duration RetryHint() const = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_WORK_QUEUE_H_
