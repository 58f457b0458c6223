// Tells ThreadSanitizer about absl::Mutex. The system's Abseil is not instrumented, so without this
// every access that a Mutex orders looks like a race. Linked into TSan builds only, where the
// linker's --wrap leads our calls here (tsan_absl_mutex.cmake).
#include <sanitizer/tsan_interface.h>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

using absl::Condition;
using absl::CondVar;
using absl::Mutex;
using absl::Notification;

// Names as the Itanium ABI mangles them, inline namespace debian3 of the system package included.
#define KEEPSET_REAL(name) __real__ZN4absl7debian3##name
#define KEEPSET_WRAP(name) __wrap__ZN4absl7debian3##name
#define KEEPSET_REAL_CONST(name) __real__ZNK4absl7debian3##name
#define KEEPSET_WRAP_CONST(name) __wrap__ZNK4absl7debian3##name

extern "C" {

// Conditions are evaluated inside Abseil, on any thread, where the lock is held but not seen.
const char* __tsan_default_suppressions() { return "race:absl::debian3::Mutex::\n"; }

void KEEPSET_REAL(5Mutex4LockEv)(Mutex* mutex);
void KEEPSET_WRAP(5Mutex4LockEv)(Mutex* mutex) {
  KEEPSET_REAL(5Mutex4LockEv)(mutex);
  __tsan_acquire(mutex);
}

void KEEPSET_REAL(5Mutex6UnlockEv)(Mutex* mutex);
void KEEPSET_WRAP(5Mutex6UnlockEv)(Mutex* mutex) {
  __tsan_release(mutex);
  KEEPSET_REAL(5Mutex6UnlockEv)(mutex);
}

bool KEEPSET_REAL(5Mutex7TryLockEv)(Mutex* mutex);
bool KEEPSET_WRAP(5Mutex7TryLockEv)(Mutex* mutex) {
  const bool locked = KEEPSET_REAL(5Mutex7TryLockEv)(mutex);
  if (locked) __tsan_acquire(mutex);
  return locked;
}

void KEEPSET_REAL(5Mutex10ReaderLockEv)(Mutex* mutex);
void KEEPSET_WRAP(5Mutex10ReaderLockEv)(Mutex* mutex) {
  KEEPSET_REAL(5Mutex10ReaderLockEv)(mutex);
  __tsan_acquire(mutex);
}

void KEEPSET_REAL(5Mutex12ReaderUnlockEv)(Mutex* mutex);
void KEEPSET_WRAP(5Mutex12ReaderUnlockEv)(Mutex* mutex) {
  __tsan_release(mutex);
  KEEPSET_REAL(5Mutex12ReaderUnlockEv)(mutex);
}

void KEEPSET_REAL(5Mutex5AwaitERKNS0_9ConditionE)(Mutex* mutex, const Condition& condition);
void KEEPSET_WRAP(5Mutex5AwaitERKNS0_9ConditionE)(Mutex* mutex, const Condition& condition) {
  __tsan_release(mutex);
  KEEPSET_REAL(5Mutex5AwaitERKNS0_9ConditionE)(mutex, condition);
  __tsan_acquire(mutex);
}

bool KEEPSET_REAL(5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE)(
    Mutex* mutex, const Condition& condition, absl::Duration timeout);
bool KEEPSET_WRAP(5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE)(
    Mutex* mutex, const Condition& condition, absl::Duration timeout) {
  __tsan_release(mutex);
  const bool met = KEEPSET_REAL(5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE)(
      mutex, condition, timeout);
  __tsan_acquire(mutex);
  return met;
}

bool KEEPSET_REAL(5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE)(Mutex* mutex,
                                                                         const Condition& condition,
                                                                         absl::Time deadline);
bool KEEPSET_WRAP(5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE)(Mutex* mutex,
                                                                         const Condition& condition,
                                                                         absl::Time deadline) {
  __tsan_release(mutex);
  const bool met = KEEPSET_REAL(5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE)(
      mutex, condition, deadline);
  __tsan_acquire(mutex);
  return met;
}

void KEEPSET_REAL(7CondVar4WaitEPNS0_5MutexE)(CondVar* condition, Mutex* mutex);
void KEEPSET_WRAP(7CondVar4WaitEPNS0_5MutexE)(CondVar* condition, Mutex* mutex) {
  __tsan_release(mutex);
  KEEPSET_REAL(7CondVar4WaitEPNS0_5MutexE)(condition, mutex);
  __tsan_acquire(mutex);
}

bool KEEPSET_REAL(7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE)(CondVar* condition,
                                                                        Mutex* mutex,
                                                                        absl::Duration timeout);
bool KEEPSET_WRAP(7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE)(CondVar* condition,
                                                                        Mutex* mutex,
                                                                        absl::Duration timeout) {
  __tsan_release(mutex);
  const bool timed_out =
      KEEPSET_REAL(7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE)(condition, mutex, timeout);
  __tsan_acquire(mutex);
  return timed_out;
}

bool KEEPSET_REAL(7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE)(CondVar* condition,
                                                                     Mutex* mutex,
                                                                     absl::Time deadline);
bool KEEPSET_WRAP(7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE)(CondVar* condition,
                                                                     Mutex* mutex,
                                                                     absl::Time deadline) {
  __tsan_release(mutex);
  const bool timed_out =
      KEEPSET_REAL(7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE)(condition, mutex, deadline);
  __tsan_acquire(mutex);
  return timed_out;
}

void KEEPSET_REAL(12Notification6NotifyEv)(Notification* notification);
void KEEPSET_WRAP(12Notification6NotifyEv)(Notification* notification) {
  __tsan_release(notification);
  KEEPSET_REAL(12Notification6NotifyEv)(notification);
}

void KEEPSET_REAL_CONST(12Notification19WaitForNotificationEv)(const Notification* notification);
void KEEPSET_WRAP_CONST(12Notification19WaitForNotificationEv)(const Notification* notification) {
  KEEPSET_REAL_CONST(12Notification19WaitForNotificationEv)(notification);
  __tsan_acquire(const_cast<Notification*>(notification));
}

bool KEEPSET_REAL_CONST(12Notification30WaitForNotificationWithTimeoutENS0_8DurationE)(
    const Notification* notification, absl::Duration timeout);
bool KEEPSET_WRAP_CONST(12Notification30WaitForNotificationWithTimeoutENS0_8DurationE)(
    const Notification* notification, absl::Duration timeout) {
  const bool notified = KEEPSET_REAL_CONST(
      12Notification30WaitForNotificationWithTimeoutENS0_8DurationE)(notification, timeout);
  if (notified) __tsan_acquire(const_cast<Notification*>(notification));
  return notified;
}

}  // extern "C"
