#include "service/rpc/compress_stream_reactor.h"

#include <cstdint>
#include <list>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "service/rpc/compress_reactor.h"
#include "service/rpc/stream_operation.h"
#include "service/rpc/stream_operations.h"
#include "service/rpc/stream_outbox.h"

namespace keepset::service {
namespace {

class CompressStreamReactor final
    : public grpc::ServerBidiReactor<v1::StreamRequest, v1::StreamResponse>,
      public StreamPeer {
 public:
  CompressStreamReactor(const ServiceContext& context, const grpc::CallbackServerContext& call,
                        OpenStreams& streams)
      : streams_(streams),
        outbox_(context.stream_credits,
                [&metrics = context.metrics](int64_t change) { metrics.AddCredits(change); }),
        operations_(context, CallInfoOf("CompressStream", call), *this) {}

  // Part of the handler: nothing reaches gRPC before it has returned.
  void Start() {
    self_ = std::static_pointer_cast<CompressStreamReactor>(shared_from_this());
    place_ = streams_.Add([weak = std::weak_ptr<CompressStreamReactor>(self_)] {
      if (const auto stream = weak.lock()) stream->Close();
    });
    absl::MutexLock lock(&mutex_);
    outbox_.Start();
    Advance();
    ReadNext();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      operations_.OnReadsClosed();
      absl::MutexLock lock(&mutex_);
      reads_closed_ = true;
      Advance();
      return;
    }
    RequestPtr message;
    {
      absl::MutexLock lock(&mutex_);
      message = std::move(incoming_);
    }
    operations_.OnMessage(std::move(message));
    absl::MutexLock lock(&mutex_);
    if (finished_) return;
    ReadNext();
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_.reset();
    if (!ok) broken_ = true;
    Advance();
  }

  void OnCancel() override {
    // A worker's reference may be the last one: it is dropped after this, as every reference is.
    const std::shared_ptr<StreamPeer> held = shared_from_this();
    {
      absl::MutexLock lock(&mutex_);
      broken_ = true;
    }
    operations_.DropAll(absl::CancelledError("the stream was cancelled or its client is gone"));
    absl::MutexLock lock(&mutex_);
    Advance();
  }

  void OnDone() override {
    operations_.DropAll(absl::CancelledError("the stream is closed"));
    streams_.Remove(place_);
    const std::shared_ptr<CompressStreamReactor> last = std::move(self_);
  }

  void Send(ResponsePtr response) override {
    absl::MutexLock lock(&mutex_);
    outbox_.Push(std::move(response));
    Advance();
  }

  void AddOpen() override {
    absl::MutexLock lock(&mutex_);
    ++open_;
  }

  void Settle(ResponsePtr answer) override {
    absl::MutexLock lock(&mutex_);
    --open_;
    if (answer != nullptr) outbox_.Push(std::move(answer));
    Advance();
  }

  bool TakeCredit() override {
    absl::MutexLock lock(&mutex_);
    return outbox_.TakeCredit();
  }

  void ReturnCredit(int64_t layers) override {
    absl::MutexLock lock(&mutex_);
    if (outbox_.ReturnCredit(layers) == StreamOutbox::Grant::kNow) Advance();
  }

 private:
  void Close() {
    absl::MutexLock lock(&mutex_);
    closing_ = true;
    Advance();
  }

  // A client that does not read its answers is not read from either: what waits for it is bounded.
  void ReadNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    read_paused_ = outbox_.full();
    if (read_paused_) return;
    incoming_ = std::make_unique<v1::StreamRequest>();
    StartRead(incoming_.get());
  }

  // Starts the next write, or finishes the stream when nothing more will come. gRPC runs reactions
  // on its own threads, never inside StartWrite, StartRead or Finish, so they may be called under
  // the lock; after Finish nothing is started any more.
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finished_ || writing_ != nullptr) return;
    if (broken_) {
      finished_ = true;
      Finish(grpc::Status::CANCELLED);
      return;
    }
    writing_ = outbox_.Pop();
    if (writing_ != nullptr) {
      StartWrite(writing_.get());
      if (read_paused_) ReadNext();
      return;
    }
    if (open_ > 0) return;
    if (reads_closed_) {
      finished_ = true;
      Finish(grpc::Status::OK);
    } else if (closing_) {
      finished_ = true;
      Finish({grpc::StatusCode::UNAVAILABLE, "the server is shutting down"});
    }
  }

  OpenStreams& streams_;
  std::list<OpenStreams::Closer>::iterator place_;

  absl::Mutex mutex_;
  std::shared_ptr<CompressStreamReactor> self_;  // gRPC's reference; dropped in OnDone
  StreamOutbox outbox_ ABSL_GUARDED_BY(mutex_);
  ResponsePtr writing_ ABSL_GUARDED_BY(mutex_);
  RequestPtr incoming_ ABSL_GUARDED_BY(mutex_);
  int64_t open_ ABSL_GUARDED_BY(mutex_) = 0;  // operations that are not settled
  bool read_paused_ ABSL_GUARDED_BY(mutex_) = false;
  bool reads_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  StreamOperations operations_;
};

}  // namespace

grpc::ServerBidiReactor<v1::StreamRequest, v1::StreamResponse>* StartCompressStream(
    const ServiceContext& context, grpc::CallbackServerContext& call, OpenStreams& streams) {
  const auto reactor = std::make_shared<CompressStreamReactor>(context, call, streams);
  reactor->Start();
  return reactor.get();
}

}  // namespace keepset::service
