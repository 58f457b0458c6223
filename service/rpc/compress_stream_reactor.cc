#include "service/rpc/compress_stream_reactor.h"

#include <cstdint>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/rpc/compress_reactor.h"
#include "service/rpc/open_operations.h"
#include "service/rpc/stream_operation.h"
#include "service/rpc/stream_outbox.h"
#include "service/rpc/wire_status.h"

namespace keepset::service {
namespace {

class CompressStreamReactor final
    : public grpc::ServerBidiReactor<v1::StreamRequest, v1::StreamResponse>,
      public std::enable_shared_from_this<CompressStreamReactor> {
 public:
  CompressStreamReactor(const ServiceContext& context, grpc::CallbackServerContext& call,
                        OpenStreams& streams)
      : context_(context),
        info_(CallInfoOf("CompressStream", call)),
        streams_(streams),
        outbox_(context.stream_credits,
                [&metrics = context.metrics](int64_t change) { metrics.AddCredits(change); }) {}

  // Part of the handler: nothing reaches gRPC before it has returned.
  void Start() {
    self_ = shared_from_this();
    place_ = streams_.Add([weak = weak_from_this()] {
      if (const auto stream = weak.lock()) stream->Close();
    });
    absl::MutexLock lock(&mutex_);
    outbox_.Start();
    Advance();
    ReadNext();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      OnReadsClosed();
      return;
    }
    RequestPtr message;
    {
      absl::MutexLock lock(&mutex_);
      message = std::move(incoming_);
    }
    Dispatch(std::move(message));
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
    {
      absl::MutexLock lock(&mutex_);
      broken_ = true;
    }
    DropAll(absl::CancelledError("the stream was cancelled or its client is gone"));
  }

  void OnDone() override {
    DropAll(absl::CancelledError("the stream is closed"));
    streams_.Remove(place_);
    const std::shared_ptr<CompressStreamReactor> last = std::move(self_);
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

  void Dispatch(RequestPtr message) {
    const uint64_t id = message->operation_id();
    switch (message->step_case()) {
      case v1::StreamRequest::kBegin:
        OnBegin(std::move(message));
        return;
      case v1::StreamRequest::kLayer:
        OnLayer(std::move(message));
        return;
      case v1::StreamRequest::kEnd:
        if (const OperationPtr operation = FindOrAnswer(id)) Enqueue(operation, std::move(message));
        return;
      case v1::StreamRequest::kCancel:
        if (const OperationPtr operation =
                Take(id, absl::CancelledError("the client cancelled the operation"))) {
          EndIfIdle(operation);
        }
        return;
      case v1::StreamRequest::STEP_NOT_SET:
        SendError(id,
                  absl::InvalidArgumentError("step is missing, want begin, layer, end or cancel"));
        return;
    }
  }

  void OnBegin(RequestPtr message) {
    const uint64_t id = message->operation_id();
    if (id == 0) {
      SendError(id, absl::InvalidArgumentError("operation_id=0, want another number"));
      return;
    }
    if (Fail(id, absl::InvalidArgumentError(absl::StrCat(
                     "operation_id=", id, " is open already, want an id of no open operation")))) {
      return;
    }
    auto operation = std::make_shared<StreamOperation>(context_, info_, std::move(message));
    if (const absl::Status status = operation->call.Admit(); !status.ok()) {
      RefuseBegin(operation, status);
      return;
    }
    operation->flow = operation->call.QueueFlow();
    bool room = false;
    {
      absl::MutexLock lock(&mutex_);
      room = operations_.size() < context_.max_open_per_stream;
      if (room) {
        operations_.Open(operation);
        operation->scheduled = true;
        operation->pending.push_back(nullptr);  // stands for Begin
      }
    }
    if (!room) {
      RefuseBegin(operation, absl::ResourceExhaustedError(absl::StrCat(
                                 context_.max_open_per_stream,
                                 " operations are open on this stream, end one of them first")));
      return;
    }
    const absl::Status queued = context_.queue.Submit(operation->flow, Strand(operation));
    if (queued.ok()) return;
    Take(id, queued);
    if (context_.overload == OverloadAnswer::kShedToFull) {
      auto response = NewStreamResponse(id);
      const absl::Status shed = operation->call.FinishShed(response->mutable_result());
      if (!shed.ok()) {
        RefuseBegin(operation, shed);
        return;
      }
      operation->call.End(shed).IgnoreError();
      Send(std::move(response));
    } else {
      RefuseBegin(operation, queued);
    }
  }

  void RefuseBegin(const OperationPtr& operation, const absl::Status& status) {
    {
      absl::MutexLock lock(&mutex_);
      operations_.MarkEnded(operation->id);
    }
    SendError(operation->id, operation->call.End(status));
  }

  void OnLayer(RequestPtr message) {
    const uint64_t id = message->operation_id();
    bool has_credit = false;
    {
      absl::MutexLock lock(&mutex_);
      has_credit = outbox_.TakeCredit();
    }
    if (!has_credit) {
      if (!Fail(id,
                absl::ResourceExhaustedError(absl::StrCat(
                    "layer ", message->layer().layer(),
                    ": no credit left on this stream, wait for a Credit before sending layers")))) {
        FindOrAnswer(id);
      }
      return;
    }
    const OperationPtr operation = FindOrAnswer(id);
    if (operation == nullptr) {
      ReturnCredit(1);
      return;
    }
    if (const absl::Status status = operation->call.LeaseLayer(message->layer()); !status.ok()) {
      ReturnCredit(1);
      Fail(id, status);
      return;
    }
    Enqueue(operation, std::move(message));
  }

  // nullptr when there is no such open operation; one that never was is answered with NOT_FOUND.
  OperationPtr FindOrAnswer(uint64_t id) {
    {
      absl::MutexLock lock(&mutex_);
      if (OperationPtr operation = operations_.Find(id); operation != nullptr) return operation;
      if (operations_.HasEnded(id)) return nullptr;
      operations_.MarkEnded(id);
    }
    SendError(id, absl::NotFoundError(
                      absl::StrCat("operation_id=", id, " is not open, want a begin first")));
    return nullptr;
  }

  void OnReadsClosed() {
    std::vector<uint64_t> unfinished;
    {
      absl::MutexLock lock(&mutex_);
      reads_closed_ = true;
      unfinished = operations_.WithoutEnd();
    }
    for (const uint64_t id : unfinished) {
      Fail(id, absl::CancelledError("the stream was half-closed before the operation's end"));
    }
    absl::MutexLock lock(&mutex_);
    Advance();
  }

  void Enqueue(const OperationPtr& operation, RequestPtr message) {
    {
      absl::MutexLock lock(&mutex_);
      if (!operation->dropped.ok()) {
        if (message->has_layer()) ReturnCreditLocked(1);
        return;
      }
      if (message->has_end()) operation->end_received = true;
      operation->pending.push_back(std::move(message));
      if (operation->scheduled) return;
      operation->scheduled = true;
    }
    context_.queue.Continue(operation->flow, Strand(operation));
  }

  WorkQueue::Task Strand(const OperationPtr& operation) {
    return [self = shared_from_this(), operation] { self->RunStrand(operation); };
  }

  void RunStrand(const OperationPtr& operation) {
    while (true) {
      RequestPtr message;
      absl::Status dropped;
      {
        absl::MutexLock lock(&mutex_);
        dropped = operation->dropped;
        if (!dropped.ok()) {
          DiscardPending(*operation);
        } else if (operation->pending.empty()) {
          operation->scheduled = false;
          return;
        } else {
          message = std::move(operation->pending.front());
          operation->pending.pop_front();
        }
      }
      if (!dropped.ok()) {
        operation->call.End(dropped).IgnoreError();
        return;
      }
      RunStep(operation, std::move(message));
      // Others wait that are no larger: this operation lets them pass between two layers.
      if (context_.queue.Waits(operation->flow.size_class)) {
        context_.queue.Continue(operation->flow, Strand(operation));
        return;
      }
    }
  }

  void RunStep(const OperationPtr& operation, RequestPtr message) {
    OperationCall& call = operation->call;
    auto response = NewStreamResponse(operation->id);
    absl::Status status;
    if (message == nullptr) {
      call.OnDequeued();
      status = call.Begin();
    } else if (message->has_end()) {
      status = call.Finish(response->mutable_result());
      if (status.ok()) {
        if (Conclude(*operation, std::move(response))) call.End(status).IgnoreError();
        return;
      }
    } else {
      const int64_t layer = message->layer().layer();
      status = call.Observe(message->layer());
      if (status.ok()) {
        if (call.EarlyResult(layer, response->mutable_layer())) Send(std::move(response));
        if (call.keeps_messages()) operation->kept.push_back(std::move(message));
      }
      ReturnCredit(1);
    }
    if (status.ok()) return;
    {
      absl::MutexLock lock(&mutex_);
      if (!operation->dropped.ok()) return;
    }
    // Ended first: a client that has read the error finds its regions free.
    const absl::Status seen = call.End(status);
    Conclude(*operation, StreamErrorResponse(operation->id, seen));
  }

  // Answers an operation and forgets it; false when it was dropped meanwhile and nobody waits.
  bool Conclude(StreamOperation& operation, ResponsePtr response) {
    absl::MutexLock lock(&mutex_);
    if (!operations_.Conclude(operation)) return false;
    outbox_.Push(std::move(response));
    Advance();
    return true;
  }

  // Removes an open operation; its strand stops at its next step. nullptr when it is not open.
  OperationPtr Take(uint64_t id, const absl::Status& why) {
    absl::MutexLock lock(&mutex_);
    return operations_.Take(id, why);
  }

  // Ends an open operation with an error; false when it is not open.
  bool Fail(uint64_t id, const absl::Status& status) {
    OperationPtr operation;
    {
      absl::MutexLock lock(&mutex_);
      operation = operations_.Take(id, status);
      if (operation == nullptr) return false;
      ++answers_due_;
    }
    EndIfIdle(operation);
    absl::MutexLock lock(&mutex_);
    --answers_due_;
    outbox_.Push(StreamErrorResponse(id, status));
    Advance();
    return true;
  }

  // Ends a taken operation here, or leaves it to the worker that runs it.
  void EndIfIdle(const OperationPtr& operation) {
    absl::Status why;
    {
      absl::MutexLock lock(&mutex_);
      DiscardPending(*operation);
      if (operation->scheduled) return;
      why = operation->dropped;
    }
    operation->call.End(why).IgnoreError();
  }

  void DropAll(const absl::Status& why) {
    std::vector<OperationPtr> operations;
    {
      absl::MutexLock lock(&mutex_);
      operations = operations_.TakeAll(why);
    }
    for (const OperationPtr& operation : operations) EndIfIdle(operation);
    absl::MutexLock lock(&mutex_);
    Advance();
  }

  void DiscardPending(StreamOperation& operation) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    int64_t layers = 0;
    for (const RequestPtr& message : operation.pending) {
      if (message != nullptr && message->has_layer()) ++layers;
    }
    operation.pending.clear();
    if (layers > 0) ReturnCreditLocked(layers);
  }

  void SendError(uint64_t id, const absl::Status& status) { Send(StreamErrorResponse(id, status)); }

  void Send(ResponsePtr response) {
    absl::MutexLock lock(&mutex_);
    outbox_.Push(std::move(response));
    Advance();
  }

  void ReturnCredit(int64_t layers) {
    absl::MutexLock lock(&mutex_);
    ReturnCreditLocked(layers);
  }

  void ReturnCreditLocked(int64_t layers) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (outbox_.ReturnCredit(layers) == StreamOutbox::Grant::kNow) Advance();
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
    if (!operations_.empty() || answers_due_ > 0) return;
    if (reads_closed_) {
      finished_ = true;
      Finish(grpc::Status::OK);
    } else if (closing_) {
      finished_ = true;
      Finish({grpc::StatusCode::UNAVAILABLE, "the server is shutting down"});
    }
  }

  const ServiceContext& context_;
  const CallInfo info_;
  OpenStreams& streams_;
  std::list<OpenStreams::Closer>::iterator place_;

  absl::Mutex mutex_;
  std::shared_ptr<CompressStreamReactor> self_;  // gRPC's reference; dropped in OnDone
  OpenOperations operations_ ABSL_GUARDED_BY(mutex_);
  StreamOutbox outbox_ ABSL_GUARDED_BY(mutex_);
  ResponsePtr writing_ ABSL_GUARDED_BY(mutex_);
  RequestPtr incoming_ ABSL_GUARDED_BY(mutex_);
  // Operations that are open no more and whose error is not in the outbox yet.
  int answers_due_ ABSL_GUARDED_BY(mutex_) = 0;
  bool read_paused_ ABSL_GUARDED_BY(mutex_) = false;
  bool reads_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace

grpc::ServerBidiReactor<v1::StreamRequest, v1::StreamResponse>* StartCompressStream(
    const ServiceContext& context, grpc::CallbackServerContext& call, OpenStreams& streams) {
  const auto reactor = std::make_shared<CompressStreamReactor>(context, call, streams);
  reactor->Start();
  return reactor.get();
}

}  // namespace keepset::service
