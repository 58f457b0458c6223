// Tells ThreadSanitizer about Abseil's locks. The system's Abseil and the libraries that stand on
// it, gRPC among them, are not instrumented, so without this every access that a Mutex orders looks
// like a race. Linked into the programs of TSan builds only: the dynamic linker finds these
// definitions before those of libabsl_synchronization.so, for our code and for the libraries, and
// each hands on to the library's own.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

using absl::BlockingCounter;
using absl::Condition;
using absl::CondVar;
using absl::Duration;
using absl::Mutex;
using absl::Notification;
using absl::Time;

// Declares `real`, the library's definition of the function `name` that this one stands before.
#define KEEPSET_REAL(name) \
  static const auto real = reinterpret_cast<decltype(&(name))>(dlsym(RTLD_NEXT, #name))

// Names are as the Itanium ABI mangles them, inline namespace debian3 of the system package
// included.
extern "C" {

// Conditions are evaluated inside Abseil, on any thread, where the lock is held but not seen.
const char* __tsan_default_suppressions() { return "race:absl::debian3::Mutex::\n"; }

void _ZN4absl7debian35Mutex4LockEv(Mutex* mutex) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex4LockEv);
  real(mutex);
  __tsan_acquire(mutex);
}

void _ZN4absl7debian35Mutex6UnlockEv(Mutex* mutex) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex6UnlockEv);
  __tsan_release(mutex);
  real(mutex);
}

bool _ZN4absl7debian35Mutex7TryLockEv(Mutex* mutex) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex7TryLockEv);
  const bool locked = real(mutex);
  if (locked) __tsan_acquire(mutex);
  return locked;
}

void _ZN4absl7debian35Mutex10ReaderLockEv(Mutex* mutex) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex10ReaderLockEv);
  real(mutex);
  __tsan_acquire(mutex);
}

void _ZN4absl7debian35Mutex12ReaderUnlockEv(Mutex* mutex) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex12ReaderUnlockEv);
  __tsan_release(mutex);
  real(mutex);
}

void _ZN4absl7debian35Mutex8LockWhenERKNS0_9ConditionE(Mutex* mutex, const Condition& condition) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex8LockWhenERKNS0_9ConditionE);
  real(mutex, condition);
  __tsan_acquire(mutex);
}

bool _ZN4absl7debian35Mutex19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE(
    Mutex* mutex, const Condition& condition, Duration timeout) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE);
  const bool met = real(mutex, condition, timeout);
  __tsan_acquire(mutex);
  return met;
}

void _ZN4absl7debian35Mutex5AwaitERKNS0_9ConditionE(Mutex* mutex, const Condition& condition) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex5AwaitERKNS0_9ConditionE);
  __tsan_release(mutex);
  real(mutex, condition);
  __tsan_acquire(mutex);
}

bool _ZN4absl7debian35Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE(
    Mutex* mutex, const Condition& condition, Duration timeout) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE);
  __tsan_release(mutex);
  const bool met = real(mutex, condition, timeout);
  __tsan_acquire(mutex);
  return met;
}

bool _ZN4absl7debian35Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE(
    Mutex* mutex, const Condition& condition, Time deadline) {
  KEEPSET_REAL(_ZN4absl7debian35Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE);
  __tsan_release(mutex);
  const bool met = real(mutex, condition, deadline);
  __tsan_acquire(mutex);
  return met;
}

void _ZN4absl7debian37CondVar4WaitEPNS0_5MutexE(CondVar* condition, Mutex* mutex) {
  KEEPSET_REAL(_ZN4absl7debian37CondVar4WaitEPNS0_5MutexE);
  __tsan_release(mutex);
  real(condition, mutex);
  __tsan_acquire(mutex);
}

bool _ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE(CondVar* condition,
                                                                          Mutex* mutex,
                                                                          Duration timeout) {
  KEEPSET_REAL(_ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE);
  __tsan_release(mutex);
  const bool timed_out = real(condition, mutex, timeout);
  __tsan_acquire(mutex);
  return timed_out;
}

bool _ZN4absl7debian37CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE(CondVar* condition,
                                                                       Mutex* mutex,
                                                                       Time deadline) {
  KEEPSET_REAL(_ZN4absl7debian37CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE);
  __tsan_release(mutex);
  const bool timed_out = real(condition, mutex, deadline);
  __tsan_acquire(mutex);
  return timed_out;
}

void _ZN4absl7debian312Notification6NotifyEv(Notification* notification) {
  KEEPSET_REAL(_ZN4absl7debian312Notification6NotifyEv);
  __tsan_release(notification);
  real(notification);
}

void _ZNK4absl7debian312Notification19WaitForNotificationEv(const Notification* notification) {
  KEEPSET_REAL(_ZNK4absl7debian312Notification19WaitForNotificationEv);
  real(notification);
  __tsan_acquire(const_cast<Notification*>(notification));
}

bool _ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE(
    const Notification* notification, Duration timeout) {
  KEEPSET_REAL(_ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE);
  const bool notified = real(notification, timeout);
  if (notified) __tsan_acquire(const_cast<Notification*>(notification));
  return notified;
}

bool _ZN4absl7debian315BlockingCounter14DecrementCountEv(BlockingCounter* counter) {
  KEEPSET_REAL(_ZN4absl7debian315BlockingCounter14DecrementCountEv);
  __tsan_release(counter);
  return real(counter);
}

void _ZN4absl7debian315BlockingCounter4WaitEv(BlockingCounter* counter) {
  KEEPSET_REAL(_ZN4absl7debian315BlockingCounter4WaitEv);
  real(counter);
  __tsan_acquire(counter);
}

}  // extern "C"
