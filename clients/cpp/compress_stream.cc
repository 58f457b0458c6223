#include "clients/cpp/compress_stream.h"

#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "clients/cpp/bidi_stream.h"

namespace keepset::client {
namespace {

// A few layers inline, or all of a large model by region.
constexpr int64_t kMaxWaitingBytes = int64_t{1} << 20;

class GrpcCompressStream final : public CompressStream {
 public:
  GrpcCompressStream(v1::CompressionService::Stub* stub, std::string session_id,
                     RegionResolver resolve, KvPlacement placement, absl::Duration call_timeout)
      : session_id_(std::move(session_id)),
        resolve_(std::move(resolve)),
        placement_(placement),
        call_timeout_(call_timeout),
        stream_(
            kMaxWaitingBytes, [this](v1::StreamResponse& response) { OnMessage(response); },
            [this](absl::Status end) { OnEnd(std::move(end)); }) {
    stub->async()->CompressStream(stream_.context(), stream_.reactor());
    stream_.Start();
  }

  absl::StatusOr<uint64_t> Begin(const OperationSpec& spec) override {
    v1::StreamRequest request;
    EncodeSpec(spec, request.mutable_begin());
    request.mutable_begin()->set_session_id(session_id_);
    uint64_t operation = 0;
    {
      absl::MutexLock lock(&mutex_);
      if (end_.has_value()) return StreamEnd();
      operation = next_operation_++;
      pending_[operation] = std::make_shared<Pending>();
      pending_[operation]->context = MakeReplyContext(spec);
    }
    request.set_operation_id(operation);
    if (absl::Status sent = stream_.Write(std::move(request), call_timeout_); !sent.ok()) {
      Forget(operation);
      return sent;
    }
    return operation;
  }

  absl::Status SendLayer(uint64_t operation, const LayerInput& layer) override {
    v1::StreamRequest request;
    request.set_operation_id(operation);
    KEEPSET_RETURN_IF_ERROR(EncodeLayer(layer, resolve_, placement_, request.mutable_layer()));
    {
      absl::MutexLock lock(&mutex_);
      const auto found = pending_.find(operation);
      if (found == pending_.end()) return UnknownOperation(operation);
      const std::shared_ptr<Pending> pending = found->second;
      const auto may_send = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return credits_ > 0 || pending->over() || end_.has_value();
      };
      if (!mutex_.AwaitWithTimeout(absl::Condition(&may_send), call_timeout_)) {
        return absl::DeadlineExceededError(absl::StrCat(
            "stream: no layer input was granted within ", absl::FormatDuration(call_timeout_)));
      }
      if (pending->failure.has_value()) {
        pending_.erase(operation);
        return *pending->failure;
      }
      if (end_.has_value()) return StreamEnd();
      NoteDestination(layer, pending->context);
      --credits_;
    }
    return stream_.Write(std::move(request), call_timeout_);
  }

  std::vector<LayerResult> TakeEarlyResults(uint64_t operation) override {
    absl::MutexLock lock(&mutex_);
    const auto found = pending_.find(operation);
    if (found == pending_.end()) return {};
    // A copy shares the gathered bytes, which Finish hands out again.
    std::vector<LayerResult> out;
    for (auto& [layer, result] : found->second->early) {
      if (result.taken) continue;
      result.taken = true;
      out.push_back(result.layer);
    }
    return out;
  }

  absl::StatusOr<OperationResult> Finish(uint64_t operation) override {
    v1::StreamRequest request;
    request.set_operation_id(operation);
    request.mutable_end();
    std::shared_ptr<Pending> pending;
    {
      absl::MutexLock lock(&mutex_);
      const auto found = pending_.find(operation);
      if (found == pending_.end()) return UnknownOperation(operation);
      pending = found->second;
      if (pending->failure.has_value()) {
        pending_.erase(found);
        return *pending->failure;
      }
    }
    if (absl::Status sent = stream_.Write(std::move(request), call_timeout_); !sent.ok()) {
      Forget(operation);
      return sent;
    }
    {
      absl::MutexLock lock(&mutex_);
      const auto answered = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return pending->over() || end_.has_value();
      };
      const bool in_time = mutex_.AwaitWithTimeout(absl::Condition(&answered), call_timeout_);
      // From here on it is this call's alone, unless another took it meanwhile.
      if (pending_.erase(operation) == 0) {
        return pending->failure.value_or(UnknownOperation(operation));
      }
      if (!pending->over() && in_time) return StreamEnd();
    }
    if (!pending->over()) {
      (void)Cancel(operation);
      return absl::DeadlineExceededError(
          absl::StrCat("stream: no result within ", absl::FormatDuration(call_timeout_)));
    }
    if (pending->failure.has_value()) return *pending->failure;
    KEEPSET_ASSIGN_OR_RETURN(OperationResult result,
                             DecodeResult(*pending->result, pending->context));
    for (LayerResult& layer : result.layers) {
      const auto early = pending->early.find(layer.layer);
      if (early == pending->early.end() || !layer.gathered.empty()) continue;
      layer.gathered = early->second.layer.gathered;
      layer.owned_k = early->second.layer.owned_k;
      layer.owned_v = early->second.layer.owned_v;
    }
    return result;
  }

  absl::Status Cancel(uint64_t operation) override {
    GiveUp(operation);
    v1::StreamRequest request;
    request.set_operation_id(operation);
    request.mutable_cancel();
    return stream_.Write(std::move(request), call_timeout_);
  }

 private:
  struct EarlyLayer {
    LayerResult layer;
    bool taken = false;
  };
  struct Pending {
    ReplyContext context;
    std::map<int64_t, EarlyLayer> early;
    std::optional<v1::OperationResult> result;
    std::optional<absl::Status> failure;

    bool over() const { return result.has_value() || failure.has_value(); }
  };

  static absl::Status UnknownOperation(uint64_t operation) {
    return absl::NotFoundError(
        absl::StrCat("stream: operation ", operation, " is over or was never begun"));
  }

  absl::Status StreamEnd() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return end_->ok() ? absl::UnavailableError("stream: ended by the server") : *end_;
  }

  void Forget(uint64_t operation) {
    absl::MutexLock lock(&mutex_);
    pending_.erase(operation);
  }

  // Forget, and calls of other threads that wait for it end.
  void GiveUp(uint64_t operation) {
    absl::MutexLock lock(&mutex_);
    const auto found = pending_.find(operation);
    if (found == pending_.end()) return;
    if (!found->second->over()) {
      found->second->failure = absl::CancelledError(
          absl::StrCat("stream: operation ", operation, " was cancelled by its client"));
    }
    pending_.erase(found);
  }

  void OnMessage(v1::StreamResponse& response) {
    absl::MutexLock lock(&mutex_);
    if (response.has_credit()) {
      credits_ += response.credit().layer_inputs();
      return;
    }
    const auto found = pending_.find(response.operation_id());
    if (found == pending_.end()) return;  // cancelled; its last answers may still be under way
    Pending& pending = *found->second;
    if (response.has_layer()) {
      absl::StatusOr<LayerResult> layer = DecodeLayer(*response.mutable_layer(), pending.context);
      if (!layer.ok()) {
        pending.failure = layer.status();
        return;
      }
      const auto index = layer->layer;
      pending.early[index] = {*std::move(layer)};
    } else if (response.has_result()) {
      pending.result = std::move(*response.mutable_result());
    } else if (response.has_error()) {
      pending.failure = absl::Status(static_cast<absl::StatusCode>(response.error().code()),
                                     response.error().message());
      if (pending.failure->ok()) {
        pending.failure = absl::InternalError("reply: an error without a code");
      }
    }
  }

  void OnEnd(absl::Status end) {
    absl::MutexLock lock(&mutex_);
    end_ = std::move(end);
  }

  const std::string session_id_;
  const RegionResolver resolve_;
  const KvPlacement placement_;
  const absl::Duration call_timeout_;
  absl::Mutex mutex_;
  uint64_t next_operation_ ABSL_GUARDED_BY(mutex_) = 1;
  int64_t credits_ ABSL_GUARDED_BY(mutex_) = 0;
  // Shared with the calls that wait for one: Cancel may take it out meanwhile.
  std::map<uint64_t, std::shared_ptr<Pending>> pending_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  // Last: its destructor waits for the callbacks, which use the members above.
  BidiStream<v1::StreamRequest, v1::StreamResponse> stream_;
};

}  // namespace

std::unique_ptr<CompressStream> NewCompressStream(v1::CompressionService::Stub* stub,
                                                  std::string session_id, RegionResolver resolve,
                                                  KvPlacement placement,
                                                  absl::Duration call_timeout) {
  return std::make_unique<GrpcCompressStream>(stub, std::move(session_id), std::move(resolve),
                                              placement, call_timeout);
}

}  // namespace keepset::client
