#include "service/rpc/compress_reactor.h"

#include <atomic>
#include <chrono>
#include <iterator>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/rpc/short_operation.h"
#include "service/rpc/wire_status.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {
namespace {

// The client's cancellation at its deadline comes before the deadline as the server counts it, from
// the arrival of the call and rounded up.
constexpr auto kDeadlineSlack = std::chrono::milliseconds(50);

// The client's deadline reaches a server as a cancellation.
absl::Status CancelStatus(const grpc::CallbackServerContext& call) {
  if (call.deadline() <= std::chrono::system_clock::now() + kDeadlineSlack) {
    return absl::DeadlineExceededError("the call's deadline has passed");
  }
  return absl::CancelledError("the client cancelled the call");
}

absl::Status Prepare(const ServiceContext& context, const v1::CompressRequest& request,
                     OperationCall& operation) {
  KEEPSET_RETURN_IF_ERROR(operation.Admit());
  if (request.layers_size() > context.codec.max_layers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layers has ", request.layers_size(), " entries, want at most ", context.codec.max_layers));
  }
  for (const v1::LayerInput& layer : request.layers()) {
    KEEPSET_RETURN_IF_ERROR(operation.LeaseLayer(layer));
  }
  return absl::OkStatus();
}

// The whole operation on the thread that received it.
absl::Status RunHere(const ServiceContext& context, const grpc::CallbackServerContext& call,
                     const v1::CompressRequest& request, OperationCall& operation,
                     v1::OperationResult* out) {
  KEEPSET_RETURN_IF_ERROR(Prepare(context, request, operation));
  operation.OnDequeued();
  KEEPSET_RETURN_IF_ERROR(operation.Begin());
  std::vector<const v1::LayerInput*> layers;
  layers.reserve(request.layers_size());
  for (const v1::LayerInput& layer : request.layers()) layers.push_back(&layer);
  KEEPSET_RETURN_IF_ERROR(operation.Observe(layers));
  if (call.IsCancelled()) return CancelStatus(call);
  return operation.Finish(out);
}

class CompressReactor final : public grpc::ServerUnaryReactor {
 public:
  CompressReactor(const ServiceContext& context, grpc::CallbackServerContext& call,
                  const v1::CompressRequest& request, v1::CompressResponse& response)
      : context_(context),
        call_(call),
        request_(request),
        response_(response),
        phase_(std::make_shared<std::atomic<Phase>>(Phase::kWaiting)),
        operation_(context, CallInfoOf("Compress", call), request.spec()) {}

  // Last act of the handler: the reactor may be gone when it returns.
  void Start() {
    if (absl::Status status = Prepare(context_, request_, operation_); !status.ok()) {
      if (TakePhase()) Answer(status);
      return;
    }
    // The task may be run after the reactor: it looks at the shared phase first.
    const std::shared_ptr<std::atomic<Phase>> phase = phase_;
    flow_ = operation_.QueueFlow();
    const absl::Status queued = context_.queue.Submit(flow_, [this, phase] {
      Phase waiting = Phase::kWaiting;
      if (phase->compare_exchange_strong(waiting, Phase::kRunning)) Run();
    });
    if (queued.ok()) return;
    if (!TakePhase()) return;
    if (context_.overload == OverloadAnswer::kShedToFull) {
      Answer(operation_.FinishShed(response_.mutable_result()));
    } else {
      operation_.MarkReject(Reject::kQueueFull);
      call_.AddTrailingMetadata(
          "retry-after-ms", absl::StrCat(absl::ToInt64Milliseconds(context_.queue.RetryHint())));
      Answer(queued);
    }
  }

  void OnCancel() override {
    cancelled_.store(true, std::memory_order_relaxed);
    if (TakePhase()) Answer(CancelStatus(call_));
  }

  void OnDone() override { delete this; }

 private:
  enum class Phase { kWaiting, kRunning };

  // Of a refusal, a worker and a cancellation, the first one answers.
  bool TakePhase() {
    Phase waiting = Phase::kWaiting;
    return phase_->compare_exchange_strong(waiting, Phase::kRunning);
  }

  void Run() {
    operation_.OnDequeued();
    if (const absl::Status begun = operation_.Begin(); !begun.ok()) {
      Answer(begun);
    } else {
      RunLayers();
    }
  }

  // Smaller operations that wait pass between two layers, or between as many as the backend takes
  // together; ours is the next of its flow.
  void RunLayers() {
    while (next_layer_ < request_.layers_size()) {
      if (cancelled_.load(std::memory_order_relaxed)) return Answer(CancelStatus(call_));
      std::vector<const v1::LayerInput*> some;
      for (int64_t i = operation_.layers_at_once(); i > 0 && next_layer_ < request_.layers_size();
           --i) {
        some.push_back(&request_.layers(next_layer_++));
      }
      if (absl::Status seen = operation_.Observe(some); !seen.ok()) return Answer(seen);
      if (flow_.size_class > 0 && context_.queue.Waits(flow_.size_class - 1)) {
        return context_.queue.Resume(flow_, [this] { RunLayers(); });
      }
    }
    if (cancelled_.load(std::memory_order_relaxed)) return Answer(CancelStatus(call_));
    Answer(operation_.Finish(response_.mutable_result()));
  }

  void Answer(const absl::Status& status) {
    const absl::Status seen = operation_.End(status);
    if (!seen.ok()) response_.Clear();
    Finish(ToGrpcStatus(seen));
  }

  const ServiceContext& context_;
  grpc::CallbackServerContext& call_;
  const v1::CompressRequest& request_;
  v1::CompressResponse& response_;
  const std::shared_ptr<std::atomic<Phase>> phase_;
  std::atomic<bool> cancelled_ = false;
  OperationCall operation_;
  WorkQueue::Flow flow_;
  int next_layer_ = 0;
};

}  // namespace

grpc::ServerUnaryReactor* StartCompress(const ServiceContext& context,
                                        grpc::CallbackServerContext& call,
                                        const v1::CompressRequest& request,
                                        v1::CompressResponse& response) {
  if (IsShort(request.spec(), context.backend.Device())) {
    if (const std::optional<WorkQueue::Seat> seat = context.queue.TakeSeat()) {
      OperationCall operation(context, CallInfoOf("Compress", call), request.spec());
      const absl::Status seen =
          operation.End(RunHere(context, call, request, operation, response.mutable_result()));
      if (!seen.ok()) response.Clear();
      grpc::ServerUnaryReactor* const reactor = call.DefaultReactor();
      reactor->Finish(ToGrpcStatus(seen));
      return reactor;
    }
  }
  auto* reactor = new CompressReactor(context, call, request, response);
  reactor->Start();
  return reactor;
}

CallInfo CallInfoOf(const char* method, const grpc::CallbackServerContext& call) {
  CallInfo info;
  info.method = method;
  const auto [begin, end] = call.client_metadata().equal_range("traceparent");
  // Of several ones nobody can say which counts.
  if (begin != end && std::next(begin) == end) {
    info.trace = ParseTraceparent({begin->second.data(), begin->second.size()});
  }
  return info;
}

}  // namespace keepset::service
