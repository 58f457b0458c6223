#include "service/end_watch.h"

#include <pthread.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace keepset::service {

EndWatch::EndWatch(Logger& log, std::function<void()> at_once)
    : log_(log), at_once_(std::move(at_once)) {
  sigemptyset(&signals_);
  sigaddset(&signals_, SIGTERM);
  sigaddset(&signals_, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
  thread_ = std::thread([this] { Run(); });
}

EndWatch::~EndWatch() {
  {
    const absl::MutexLock lock(&mutex_);
    is_over_ = true;
  }
  // To that thread alone, which takes it by sigwait.
  pthread_kill(thread_.native_handle(), SIGINT);
  thread_.join();
}

void EndWatch::Run() {
  bool is_first = true;
  while (true) {
    int signal = 0;
    if (sigwait(&signals_, &signal) != 0) continue;
    {
      const absl::MutexLock lock(&mutex_);
      if (is_over_) return;
      is_ending_ = true;
    }
    log_.Info("signal", {{"number", absl::StrCat(signal)}});
    if (!std::exchange(is_first, false)) at_once_();
  }
}

void EndWatch::EndForFault() {
  const absl::MutexLock lock(&mutex_);
  has_fault_ = true;
  is_ending_ = true;
}

void EndWatch::AwaitEnd() {
  const absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(&is_ending_));
}

bool EndWatch::has_fault() const {
  const absl::MutexLock lock(&mutex_);
  return has_fault_;
}

}  // namespace keepset::service
