#include "service/rpc/admission.h"

namespace keepset::service {

absl::StatusOr<Admission::Ticket> Admission::Enter() {
  absl::MutexLock lock(&mutex_);
  if (draining_) return absl::UnavailableError("the server is draining, use another one");
  ++running_;
  if (on_change_) on_change_(running_);
  return Ticket(this);
}

void Admission::Leave() {
  absl::MutexLock lock(&mutex_);
  --running_;
  if (on_change_) on_change_(running_);
}

void Admission::StartDraining() {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
}

bool Admission::draining() const {
  absl::MutexLock lock(&mutex_);
  return draining_;
}

int64_t Admission::running() const {
  absl::MutexLock lock(&mutex_);
  return running_;
}

bool Admission::WaitIdle(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithTimeout(absl::Condition(this, &Admission::Idle), timeout);
}

}  // namespace keepset::service
