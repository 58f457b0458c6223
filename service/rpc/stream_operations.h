// The operations that one CompressStream carries. Layers of one operation are worked on in order by
// one worker at a time (its strand); different operations run in parallel; each is answered once.
// How answers and credit travel is the stream's (StreamPeer).
#ifndef KEEPSET_SERVICE_RPC_STREAM_OPERATIONS_H_
#define KEEPSET_SERVICE_RPC_STREAM_OPERATIONS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "service/rpc/open_operations.h"
#include "service/rpc/operation_call.h"
#include "service/rpc/service_context.h"
#include "service/rpc/stream_operation.h"
#include "service/rpc/stream_outbox.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {

// The stream as its operations see it. Thread-safe. Shared: a worker may still answer when gRPC is
// done with the stream; its answer then goes nowhere.
class StreamPeer : public std::enable_shared_from_this<StreamPeer> {
 public:
  virtual ~StreamPeer() = default;

  // An early answer, or one to a message of no open operation.
  virtual void Send(ResponsePtr response) = 0;
  // An operation has begun: the stream does not end before it is settled.
  virtual void AddOpen() = 0;
  // Settles one operation by its last answer; nullptr when nobody waits for one.
  virtual void Settle(ResponsePtr answer) = 0;

  // Takes the credit of one layer; false when the client has none left.
  [[nodiscard]] virtual bool TakeCredit() = 0;
  virtual void ReturnCredit(int64_t layers) = 0;
};

// OnMessage and OnReadsClosed are the reader's, one call at a time; DropAll may come at any time.
class StreamOperations {
 public:
  // `context` must outlive this; `peer` owns it.
  StreamOperations(const ServiceContext& context, CallInfo info, StreamPeer& peer);
  StreamOperations(const StreamOperations&) = delete;
  StreamOperations& operator=(const StreamOperations&) = delete;

  void OnMessage(RequestPtr message);
  // No message comes any more: operations without their end are answered with CANCELLED.
  void OnReadsClosed();
  // Ends all operations; nobody waits for their answers.
  void DropAll(const absl::Status& why);

 private:
  // Whether the message comes behind the end of an open operation. Refused alone: rows may be on
  // the move, so that the operation is answered by what its end comes to.
  bool RefusedAfterEnd(const v1::StreamRequest& message);
  void OnBegin(RequestPtr message);
  void RefuseBegin(const OperationPtr& operation, const absl::Status& status);
  void OnLayer(RequestPtr message);
  void OnCancel(uint64_t id);
  // nullptr when there is no such open operation; one that never was is answered with NOT_FOUND.
  OperationPtr FindOrAnswer(uint64_t id);

  void Enqueue(const OperationPtr& operation, RequestPtr message);
  // Whether the caller, who has the operation's strand, could run it itself.
  bool RanHere(const OperationPtr& operation);
  WorkQueue::Task Strand(const OperationPtr& operation);
  void RunStrand(const OperationPtr& operation);
  // Begin or the end.
  void RunStep(const OperationPtr& operation, RequestPtr message);
  // Layers that have arrived, observed together where the backend gains by it.
  static std::vector<RequestPtr> TakeLayers(StreamOperation& operation);
  void RunLayers(const OperationPtr& operation, std::vector<RequestPtr> messages);
  void EndRefused(const OperationPtr& operation, const absl::Status& status);

  // Answers an operation and forgets it; false when it was dropped meanwhile and nobody waits.
  bool Conclude(StreamOperation& operation, ResponsePtr response);
  // The last answer of an operation that is open no more, nullptr for none, and those behind it.
  void Settle(const StreamOperation& operation, ResponsePtr answer);
  // Removes an open operation; its strand stops at its next step. nullptr when it is not open.
  OperationPtr Take(uint64_t id, const absl::Status& why);
  // Ends an open operation, whose end has not arrived, with an error; false when it is not open.
  bool Fail(uint64_t id, const absl::Status& status);
  // Ends a taken operation here, or leaves it to the worker that runs it.
  void EndIfIdle(const OperationPtr& operation);
  void DiscardPending(StreamOperation& operation);
  void SendError(uint64_t id, const absl::Status& status);

  const ServiceContext& context_;
  const CallInfo info_;
  StreamPeer& peer_;
  absl::Mutex mutex_;  // guards also what StreamOperation says; never held while `peer_` is called
  OpenOperations operations_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_STREAM_OPERATIONS_H_
