// One operation as the service sees it, the same for unary calls and streams:
//
//   Admit -> LeaseLayer* (reader) | Begin -> Observe* -> Finish (worker) -> End
//
// It owns admission, leases, table snapshot, stage times, the log line and the metrics sample of
// the operation. LeaseLayer may run beside the worker's calls; everything else is called by one
// thread at a time. Messages given to Observe must live until End.
#ifndef KEEPSET_SERVICE_RPC_OPERATION_CALL_H_
#define KEEPSET_SERVICE_RPC_OPERATION_CALL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/operation.h"
#include "keepset/v1/compression.pb.h"
#include "service/rpc/lease_set.h"
#include "service/rpc/service_context.h"
#include "service/rpc/trace_context.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {

// What is known of the call an operation came in with.
struct CallInfo {
  std::string method;                 // "Compress", "CompressStream"
  std::optional<TraceContext> trace;  // of the call's metadata
};

class OperationCall {
 public:
  // Checks admission, session and fence, takes the table snapshot. `spec` must outlive the call.
  OperationCall(const ServiceContext& context, const CallInfo& info, const v1::OperationSpec& spec);
  ~OperationCall();
  OperationCall(const OperationCall&) = delete;
  OperationCall& operator=(const OperationCall&) = delete;

  // Unavailable: draining. InvalidArgument: request id too long. NotFound: session. Aborted: stale
  // fence. Must be called first.
  absl::Status Admit();

  // Counts inline bytes and leases the regions of one layer. ResourceExhausted: inline limit.
  absl::Status LeaseLayer(const v1::LayerInput& layer);

  // Where the operation waits: its tenant's tasks (or its session's) of about its size.
  WorkQueue::Flow QueueFlow() const;

  // A worker took the operation over: its time in the queue ends.
  void OnDequeued();

  // What libraries throw is answered too: ResourceExhausted when memory ran out, else Internal.
  absl::Status Begin() {
    return Guarded([this] { return BeginOperation(); });
  }
  absl::Status Observe(const v1::LayerInput& layer) {
    const v1::LayerInput* const one[] = {&layer};
    return Observe(one);
  }
  // Several layers in order, with the errors of one after the other.
  absl::Status Observe(absl::Span<const v1::LayerInput* const> layers) {
    return Guarded([this, layers] { return ObserveLayers(layers); });
  }
  // How many layers a caller that has them all hands over before it lets others pass. After Begin.
  int64_t layers_at_once() const { return operation_->layers_at_once(); }
  // The layer's keep set when it is final already.
  bool EarlyResult(int64_t layer, v1::LayerResult* out) const;
  // Result, gathering, encoding; drops the leases.
  absl::Status Finish(v1::OperationResult* out) {
    return Guarded([this, out] { return FinishOperation(out); });
  }
  // The answer of an operation the queue had no room for; Begin is not needed before.
  absl::Status FinishShed(v1::OperationResult* out) {
    return Guarded([this, out] { return ShedOperation(out); });
  }

  // Drops leases and the engine's operation, writes log line and metrics, once. Returns what the
  // client may see of `status`.
  absl::Status End(const absl::Status& status);

  // Whether messages given to Observe are needed again by Finish.
  bool keeps_messages() const { return wire_.gather() != v1::GATHER_NONE; }

  // What refuses the operation, where its status does not say. Any thread, before End.
  void MarkReject(Reject why);

 private:
  static absl::Status Guarded(absl::FunctionRef<absl::Status()> work);
  absl::Status BeginOperation();
  absl::Status ObserveLayers(absl::Span<const v1::LayerInput* const> layers);
  absl::StatusOr<DecodedLayer> DecodeNext(const v1::LayerInput& wire, size_t num_before);
  absl::Status FinishOperation(v1::OperationResult* out);
  absl::Status ShedOperation(v1::OperationResult* out);
  absl::Status CheckReplySize(const engine::OperationSpec& spec) const;
  absl::Status ResolveTable(engine::OperationSpec& spec);
  absl::Status GatherLayers(const engine::OperationResult& result, v1::OperationResult* out);
  absl::Status GatherInPlace();
  // Counts the bytes and views what the reply will hold of a layer as its destination.
  absl::Status MakeRoomInline(engine::LayerGather& gather, v1::LayerResult* out);
  absl::Status CloseInlineGaps(const engine::LayerGather& gather, const engine::LayerResult& result,
                               v1::LayerResult* out) const;
  void EncodeInto(const engine::OperationResult& result, v1::OperationResult* out);
  void FinishShadow(v1::OperationResult* out);
  void ReleaseResources();
  void RecordReject(const absl::Status& status);
  // What a peer may read of it.
  std::string PublicText(const absl::Status& status) const;
  absl::Duration LeaseTime() const;
  void WriteLogLine(const absl::Status& status);

  const ServiceContext& context_;
  const CallInfo info_;
  const v1::OperationSpec& wire_;
  const absl::Duration arrival_;
  const std::string correlation_id_;
  const std::shared_ptr<const tables::TableSnapshot> snapshot_;

  Admission::Ticket ticket_;
  LeaseSet leases_;
  // What the reader of a stream writes beside the worker.
  mutable absl::Mutex reader_mutex_;
  int64_t inline_bytes_ ABSL_GUARDED_BY(reader_mutex_) = 0;
  absl::Duration lease_time_ ABSL_GUARDED_BY(reader_mutex_);
  std::optional<Reject> reject_ ABSL_GUARDED_BY(reader_mutex_);

  std::unique_ptr<engine::Operation> operation_;
  std::vector<DecodedLayer> layers_;  // kept for gathering, in layer order
  int64_t gathered_bytes_ = 0;
  bool is_moving_ = false;  // rows of the worker's own K and V: a failure loses its cache
  bool ended_ = false;

  absl::Duration queue_time_;
  absl::Duration reply_time_;
  OperationSample sample_;
  v1::TableIdentity selection_;  // why that table, for the reply; without identity
  // Nothing: no second table is asked. Not OK: why the one asked for cannot be.
  std::optional<absl::Status> shadow_;
  std::string transport_ = "inline";
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_OPERATION_CALL_H_
