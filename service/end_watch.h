// When a process has to end: by SIGTERM or SIGINT, or because the server's device failed.
#ifndef KEEPSET_SERVICE_END_WATCH_H_
#define KEEPSET_SERVICE_END_WATCH_H_

#include <csignal>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "base/log.h"

namespace keepset::service {

// Blocks SIGTERM and SIGINT of the calling thread and of those it starts from now on, so that its
// own thread alone takes them, for the process's life: one at a time, made before other threads.
class EndWatch {
 public:
  // at_once: called on the watch's thread for every signal but the first. A failed device is no
  // signal: the first one after it cuts nothing.
  EndWatch(Logger& log, std::function<void()> at_once);
  ~EndWatch();  // leaves the signals blocked
  EndWatch(const EndWatch&) = delete;
  EndWatch& operator=(const EndWatch&) = delete;

  // From any thread: the process has to end without a signal.
  void EndForFault();
  // Waits for a signal or a fault.
  void AwaitEnd();
  bool has_fault() const;

 private:
  void Run();

  Logger& log_;
  const std::function<void()> at_once_;
  sigset_t signals_;
  mutable absl::Mutex mutex_;
  bool has_fault_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_ending_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_over_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_END_WATCH_H_
