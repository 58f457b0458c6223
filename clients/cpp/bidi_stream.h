// A bidirectional gRPC stream with a time limit on every write, over the callback API: messages
// arrive on gRPC's threads, writes block their caller.
//
// Usage: construct, hand context() and reactor() to the stub, Start(), Write() ..., destroy.
// The destructor cancels the call and waits for its end. Write may be called from many threads.
#ifndef KEEPSET_CLIENTS_CPP_BIDI_STREAM_H_
#define KEEPSET_CLIENTS_CPP_BIDI_STREAM_H_

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/client_callback.h>

#include <functional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "clients/cpp/rpc_status.h"

namespace keepset::client {

// The destructor is virtual through the base, which clang-tidy does not see in a template.
template <typename Request, typename Response>
// NOLINTNEXTLINE(cppcoreguidelines-virtual-class-destructor)
class BidiStream final : private grpc::ClientBidiReactor<Request, Response> {
 public:
  // `on_message` sees one message after the other; `on_end` comes once, after the last of them,
  // with the status of the call. Neither may call into the stream.
  BidiStream(std::function<void(Response&)> on_message, std::function<void(absl::Status)> on_end)
      : on_message_(std::move(on_message)), on_end_(std::move(on_end)) {}

  ~BidiStream() override {
    if (!started_) return;
    context_.TryCancel();
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(&ended_));
  }

  grpc::ClientContext* context() { return &context_; }
  grpc::ClientBidiReactor<Request, Response>* reactor() { return this; }

  void Start() {
    started_ = true;
    // Keeps OnDone from running while a writer may still start a write.
    this->AddHold();
    this->StartRead(&response_);
    this->StartCall();
  }

  void Cancel() { context_.TryCancel(); }

  // DeadlineExceeded ends the whole stream, since a write cannot be taken back. A stream that has
  // ended answers its status.
  absl::Status Write(const Request& request, absl::Duration timeout) {
    absl::MutexLock write_lock(&write_mutex_);
    {
      absl::MutexLock lock(&mutex_);
      if (reads_ended_) return AwaitEnd(timeout);
      writing_ = true;
    }
    this->StartWrite(&request);
    absl::MutexLock lock(&mutex_);
    const auto written = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return !writing_; };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&written), timeout)) {
      context_.TryCancel();
      mutex_.Await(absl::Condition(&written));
      return absl::DeadlineExceededError("stream: " + absl::FormatDuration(timeout) +
                                         " passed before a message could be sent");
    }
    return write_ok_ ? absl::OkStatus() : AwaitEnd(timeout);
  }

 private:
  absl::Status AwaitEnd(absl::Duration timeout) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!mutex_.AwaitWithTimeout(absl::Condition(&ended_), timeout) || status_.ok()) {
      return absl::UnavailableError("stream: ended by the server");
    }
    return status_;
  }

  void OnReadDone(bool ok) override {
    if (ok) {
      on_message_(response_);
      this->StartRead(&response_);
      return;
    }
    bool last;
    {
      absl::MutexLock lock(&mutex_);
      reads_ended_ = true;
      last = !writing_;
    }
    if (last) this->RemoveHold();
  }

  void OnWriteDone(bool ok) override {
    bool last;
    {
      absl::MutexLock lock(&mutex_);
      writing_ = false;
      write_ok_ = ok;
      last = reads_ended_;
    }
    if (last) this->RemoveHold();
  }

  void OnDone(const grpc::Status& status) override {
    const absl::Status converted = FromRpcStatus(status);
    on_end_(converted);
    absl::MutexLock lock(&mutex_);
    status_ = converted;
    ended_ = true;
  }

  const std::function<void(Response&)> on_message_;
  const std::function<void(absl::Status)> on_end_;
  grpc::ClientContext context_;
  Response response_;
  bool started_ = false;
  absl::Mutex write_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  absl::Mutex mutex_;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool write_ok_ ABSL_GUARDED_BY(mutex_) = false;
  bool reads_ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_BIDI_STREAM_H_
