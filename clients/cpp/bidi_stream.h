// A bidirectional gRPC stream over the callback API: messages arrive on gRPC's threads and are sent
// by them; who writes waits only while too much waits to be sent, for a limited time.
//
// Usage: construct, hand context() and reactor() to the stub, Start(), Write() ..., destroy.
// The destructor cancels the call and waits for its end. Write may be called from many threads.
#ifndef KEEPSET_CLIENTS_CPP_BIDI_STREAM_H_
#define KEEPSET_CLIENTS_CPP_BIDI_STREAM_H_

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/client_callback.h>

#include <cstdint>
#include <deque>
#include <functional>
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
  // with the status of the call. Neither may call into the stream. A message is accepted while at
  // most `max_waiting_bytes` of earlier ones wait to be sent; 0: while none does.
  BidiStream(int64_t max_waiting_bytes, std::function<void(Response&)> on_message,
             std::function<void(absl::Status)> on_end)
      : max_waiting_bytes_(max_waiting_bytes),
        on_message_(std::move(on_message)),
        on_end_(std::move(on_end)) {}

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

  // Accepts a message to be sent after those before it. DeadlineExceeded ends the whole stream,
  // whose peer takes nothing. A stream that has ended answers its status, though what was accepted
  // before it ended may not have been sent.
  absl::Status Write(Request request, absl::Duration timeout) {
    absl::MutexLock lock(&mutex_);
    const auto accepts = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
      return waiting_bytes_ <= max_waiting_bytes_ || ends_;
    };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&accepts), timeout)) {
      context_.TryCancel();
      return absl::DeadlineExceededError("stream: " + absl::FormatDuration(timeout) +
                                         " passed before a message could be sent");
    }
    if (ends_) return AwaitEnd(timeout);
    waiting_bytes_ += BytesOf(request);
    waiting_.push_back(std::move(request));
    if (waiting_.size() == 1) WriteFirst();
    return absl::OkStatus();
  }

 private:
  // Never 0, so that one message that waits is seen.
  static int64_t BytesOf(const Request& request) {
    return static_cast<int64_t>(request.ByteSizeLong()) + 1;
  }

  // gRPC reacts on its own threads, never inside StartWrite.
  void WriteFirst() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    grpc::WriteOptions options;
    // Small messages with others behind them share a packet.
    if (waiting_.size() > 1) options.set_buffer_hint();
    this->StartWrite(&waiting_.front(), options);
  }

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
      ends_ = true;
      reads_ended_ = true;
      last = waiting_.empty();
    }
    if (last) this->RemoveHold();
  }

  void OnWriteDone(bool ok) override {
    bool last;
    {
      absl::MutexLock lock(&mutex_);
      waiting_bytes_ -= BytesOf(waiting_.front());
      waiting_.pop_front();
      if (!ok) ends_ = true;
      if (ends_) {
        waiting_.clear();
        waiting_bytes_ = 0;
      }
      if (!waiting_.empty()) WriteFirst();
      last = reads_ended_ && waiting_.empty();
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

  const int64_t max_waiting_bytes_;
  const std::function<void(Response&)> on_message_;
  const std::function<void(absl::Status)> on_end_;
  grpc::ClientContext context_;
  Response response_;
  bool started_ = false;
  absl::Mutex mutex_;
  std::deque<Request> waiting_ ABSL_GUARDED_BY(mutex_);  // the first one is being written
  int64_t waiting_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool ends_ ABSL_GUARDED_BY(mutex_) = false;  // nothing more is accepted
  bool reads_ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_BIDI_STREAM_H_
