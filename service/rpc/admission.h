// Which operations run, and whether new ones are let in. Thread-safe.
#ifndef KEEPSET_SERVICE_RPC_ADMISSION_H_
#define KEEPSET_SERVICE_RPC_ADMISSION_H_

#include <cstdint>
#include <functional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace keepset::service {

class Admission {
 public:
  // Counts one operation as long as it lives. Movable, not copyable.
  class Ticket {
   public:
    Ticket() = default;
    explicit Ticket(Admission* admission) : admission_(admission) {}
    Ticket(Ticket&& other) noexcept : admission_(std::exchange(other.admission_, nullptr)) {}
    Ticket& operator=(Ticket&& other) noexcept {
      if (this != &other) {
        Release();
        admission_ = std::exchange(other.admission_, nullptr);
      }
      return *this;
    }
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;
    ~Ticket() { Release(); }

   private:
    void Release() {
      if (Admission* admission = std::exchange(admission_, nullptr)) admission->Leave();
    }
    Admission* admission_ = nullptr;
  };

  explicit Admission(std::function<void(int64_t running)> on_change)
      : on_change_(std::move(on_change)) {}

  // Unavailable while draining. The admission must outlive its tickets.
  absl::StatusOr<Ticket> Enter();

  void StartDraining();
  bool draining() const;
  int64_t running() const;
  // Waits until no operation runs; false when `timeout` passed first.
  bool WaitIdle(absl::Duration timeout);

 private:
  void Leave();
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_ == 0; }

  const std::function<void(int64_t)> on_change_;
  mutable absl::Mutex mutex_;
  int64_t running_ ABSL_GUARDED_BY(mutex_) = 0;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_ADMISSION_H_
