#include "service/rpc/stream_operations.h"

#include <deque>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "service/rpc/short_operation.h"

namespace keepset::service {

StreamOperations::StreamOperations(const ServiceContext& context, CallInfo info, StreamPeer& peer)
    : context_(context), info_(std::move(info)), peer_(peer) {}

void StreamOperations::OnMessage(RequestPtr message) {
  const uint64_t id = message->operation_id();
  if (RefusedAfterEnd(*message)) return;
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
      OnCancel(id);
      return;
    case v1::StreamRequest::STEP_NOT_SET: {
      const absl::Status refusal =
          absl::InvalidArgumentError("step is missing, want begin, layer, end or cancel");
      if (!Fail(id, refusal)) SendError(id, refusal);
      return;
    }
  }
}

bool StreamOperations::RefusedAfterEnd(const v1::StreamRequest& message) {
  if (message.has_cancel()) return false;
  {
    absl::MutexLock lock(&mutex_);
    const OperationPtr operation = operations_.Find(message.operation_id());
    if (operation == nullptr || !operation->end_received) return false;
    // Layers and ends have no answer of their own.
    if (!message.has_layer() && !message.has_end()) ++operation->refused_after_end;
  }
  if (message.has_layer() && peer_.TakeCredit()) peer_.ReturnCredit(1);
  return true;
}

void StreamOperations::OnBegin(RequestPtr message) {
  const uint64_t id = message->operation_id();
  if (id == 0) {
    SendError(id, absl::InvalidArgumentError("operation_id=0, want another number"));
    return;
  }
  if (Fail(id, absl::InvalidArgumentError(absl::StrCat(
                   "operation_id=", id, " is open already, want an id of no open operation")))) {
    return;
  }
  peer_.AddOpen();
  auto operation = std::make_shared<StreamOperation>(context_, info_, std::move(message));
  if (const absl::Status status = operation->call.Admit(); !status.ok()) {
    RefuseBegin(operation, status);
    return;
  }
  operation->flow = operation->call.QueueFlow();
  operation->is_short = IsShort(operation->begin->begin(), context_.backend.Device());
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
    operation->call.MarkReject(Reject::kStreamFull);
    RefuseBegin(operation, absl::ResourceExhaustedError(absl::StrCat(
                               context_.max_open_per_stream,
                               " operations are open on this stream, end one of them first")));
    return;
  }
  if (RanHere(operation)) return;
  const absl::Status queued = context_.queue.Submit(operation->flow, Strand(operation));
  if (queued.ok()) return;
  const bool is_awaited = Take(id, queued) != nullptr;
  absl::Status refusal = queued;
  ResponsePtr answer;
  if (context_.overload == OverloadAnswer::kShedToFull) {
    answer = NewStreamResponse(id);
    refusal = operation->call.FinishShed(answer->mutable_result());
  } else {
    operation->call.MarkReject(Reject::kQueueFull);
  }
  const absl::Status seen = operation->call.End(refusal);
  if (!refusal.ok()) answer = StreamErrorResponse(id, seen);
  if (is_awaited) peer_.Settle(std::move(answer));
}

void StreamOperations::RefuseBegin(const OperationPtr& operation, const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    operations_.MarkEnded(operation->id);
  }
  peer_.Settle(StreamErrorResponse(operation->id, operation->call.End(status)));
}

void StreamOperations::OnLayer(RequestPtr message) {
  const uint64_t id = message->operation_id();
  const bool has_credit = peer_.TakeCredit();
  const OperationPtr operation = FindOrAnswer(id);
  if (operation == nullptr) {
    if (has_credit) peer_.ReturnCredit(1);
    return;
  }
  if (!has_credit) {
    operation->call.MarkReject(Reject::kNoCredit);
    Fail(id, absl::ResourceExhaustedError(absl::StrCat(
                 "layer ", message->layer().layer(),
                 ": no credit left on this stream, wait for a Credit before sending layers")));
    return;
  }
  if (const absl::Status status = operation->call.LeaseLayer(message->layer()); !status.ok()) {
    peer_.ReturnCredit(1);
    Fail(id, status);
    return;
  }
  Enqueue(operation, std::move(message));
}

void StreamOperations::OnCancel(uint64_t id) {
  const OperationPtr operation =
      Take(id, absl::CancelledError("the client cancelled the operation"));
  if (operation == nullptr) return;
  EndIfIdle(operation);
  Settle(*operation, nullptr);
}

OperationPtr StreamOperations::FindOrAnswer(uint64_t id) {
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

void StreamOperations::OnReadsClosed() {
  std::vector<uint64_t> unfinished;
  {
    absl::MutexLock lock(&mutex_);
    unfinished = operations_.WithoutEnd();
  }
  for (const uint64_t id : unfinished) {
    Fail(id, absl::CancelledError("the stream was half-closed before the operation's end"));
  }
}

void StreamOperations::Enqueue(const OperationPtr& operation, RequestPtr message) {
  const bool has_layer = message->has_layer();
  bool is_dropped = false;
  {
    absl::MutexLock lock(&mutex_);
    is_dropped = !operation->dropped.ok();
    if (!is_dropped) {
      if (message->has_end()) operation->end_received = true;
      operation->pending.push_back(std::move(message));
      if (operation->scheduled) return;
      operation->scheduled = true;
    }
  }
  if (is_dropped) {
    if (has_layer) peer_.ReturnCredit(1);
    return;
  }
  if (RanHere(operation)) return;
  context_.queue.Continue(operation->flow, Strand(operation));
}

bool StreamOperations::RanHere(const OperationPtr& operation) {
  if (!operation->is_short) return false;
  const std::optional<WorkQueue::Seat> seat = context_.queue.TakeSeat();
  if (!seat.has_value()) return false;
  RunStrand(operation);
  return true;
}

WorkQueue::Task StreamOperations::Strand(const OperationPtr& operation) {
  return [this, owner = peer_.shared_from_this(), operation] { RunStrand(operation); };
}

void StreamOperations::RunStrand(const OperationPtr& operation) {
  while (true) {
    RequestPtr message;
    std::vector<RequestPtr> layers;
    absl::Status dropped;
    {
      absl::MutexLock lock(&mutex_);
      dropped = operation->dropped;
      if (dropped.ok()) {
        if (operation->pending.empty()) {
          operation->scheduled = false;
          return;
        }
        layers = TakeLayers(*operation);
        if (layers.empty()) {
          message = std::move(operation->pending.front());
          operation->pending.pop_front();
        }
      }
    }
    if (!dropped.ok()) {
      DiscardPending(*operation);
      operation->call.End(dropped).IgnoreError();
      return;
    }
    if (layers.empty()) {
      RunStep(operation, std::move(message));
    } else {
      RunLayers(operation, std::move(layers));
    }
    // Others wait that are no larger: this operation lets them pass between two layers.
    if (context_.queue.Waits(operation->flow.size_class)) {
      context_.queue.Continue(operation->flow, Strand(operation));
      return;
    }
  }
}

// Those that wait one behind the other, as many as the backend takes together.
std::vector<RequestPtr> StreamOperations::TakeLayers(StreamOperation& operation) {
  std::vector<RequestPtr> layers;
  std::deque<RequestPtr>& pending = operation.pending;
  while (
      !pending.empty() && pending.front() != nullptr && pending.front()->has_layer() &&
      (layers.empty() || static_cast<int64_t>(layers.size()) < operation.call.layers_at_once())) {
    layers.push_back(std::move(pending.front()));
    pending.pop_front();
  }
  return layers;
}

void StreamOperations::RunLayers(const OperationPtr& operation, std::vector<RequestPtr> messages) {
  OperationCall& call = operation->call;
  std::vector<const v1::LayerInput*> layers;
  layers.reserve(messages.size());
  for (const RequestPtr& message : messages) layers.push_back(&message->layer());
  const absl::Status status = call.Observe(layers);
  // When one was refused, those before it are answered. The refused one is not above them, or has
  // no result.
  int64_t answered = -1;
  for (const v1::LayerInput* const layer : layers) {
    if (layer->layer() <= answered) break;
    auto response = NewStreamResponse(operation->id);
    if (call.EarlyResult(layer->layer(), response->mutable_layer())) {
      answered = layer->layer();
      peer_.Send(std::move(response));
    }
  }
  if (status.ok() && call.keeps_messages()) {
    std::move(messages.begin(), messages.end(), std::back_inserter(operation->kept));
  }
  peer_.ReturnCredit(static_cast<int64_t>(layers.size()));
  if (!status.ok()) EndRefused(operation, status);
}

void StreamOperations::RunStep(const OperationPtr& operation, RequestPtr message) {
  OperationCall& call = operation->call;
  auto response = NewStreamResponse(operation->id);
  absl::Status status;
  if (message == nullptr) {
    call.OnDequeued();
    status = call.Begin();
  } else {
    status = call.Finish(response->mutable_result());
    if (status.ok()) {
      if (Conclude(*operation, std::move(response))) call.End(status).IgnoreError();
      return;
    }
  }
  if (!status.ok()) EndRefused(operation, status);
}

void StreamOperations::EndRefused(const OperationPtr& operation, const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    if (!operation->dropped.ok()) return;
  }
  // Ended first: a client that has read the error finds its regions free.
  const absl::Status seen = operation->call.End(status);
  Conclude(*operation, StreamErrorResponse(operation->id, seen));
}

bool StreamOperations::Conclude(StreamOperation& operation, ResponsePtr response) {
  {
    absl::MutexLock lock(&mutex_);
    if (!operations_.Conclude(operation)) return false;
  }
  Settle(operation, std::move(response));
  return true;
}

void StreamOperations::Settle(const StreamOperation& operation, ResponsePtr answer) {
  int64_t refused = 0;
  {
    absl::MutexLock lock(&mutex_);
    refused = operation.refused_after_end;
  }
  if (refused == 0) {
    peer_.Settle(std::move(answer));
    return;
  }
  if (answer != nullptr) peer_.Send(std::move(answer));
  for (; refused > 0; --refused) {
    SendError(operation.id, absl::InvalidArgumentError(absl::StrCat(
                                "operation_id=", operation.id,
                                " was open and had its end, want an id of no open operation")));
  }
  peer_.Settle(nullptr);
}

OperationPtr StreamOperations::Take(uint64_t id, const absl::Status& why) {
  absl::MutexLock lock(&mutex_);
  return operations_.Take(id, why);
}

bool StreamOperations::Fail(uint64_t id, const absl::Status& status) {
  const OperationPtr operation = Take(id, status);
  if (operation == nullptr) return false;
  EndIfIdle(operation);
  peer_.Settle(StreamErrorResponse(id, status));
  return true;
}

void StreamOperations::EndIfIdle(const OperationPtr& operation) {
  DiscardPending(*operation);
  absl::Status why;
  {
    absl::MutexLock lock(&mutex_);
    if (operation->scheduled) return;
    why = operation->dropped;
  }
  operation->call.End(why).IgnoreError();
}

void StreamOperations::DropAll(const absl::Status& why) {
  std::vector<OperationPtr> operations;
  {
    absl::MutexLock lock(&mutex_);
    operations = operations_.TakeAll(why);
  }
  for (const OperationPtr& operation : operations) {
    EndIfIdle(operation);
    peer_.Settle(nullptr);
  }
}

void StreamOperations::DiscardPending(StreamOperation& operation) {
  std::deque<RequestPtr> pending;
  {
    absl::MutexLock lock(&mutex_);
    pending.swap(operation.pending);
  }
  int64_t layers = 0;
  for (const RequestPtr& message : pending) {
    if (message != nullptr && message->has_layer()) ++layers;
  }
  if (layers > 0) peer_.ReturnCredit(layers);
}

void StreamOperations::SendError(uint64_t id, const absl::Status& status) {
  peer_.Send(StreamErrorResponse(id, status));
}

}  // namespace keepset::service
