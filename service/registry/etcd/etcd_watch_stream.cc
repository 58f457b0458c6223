#include "service/registry/etcd/etcd_watch_stream.h"

#include <grpcpp/support/sync_stream.h>

#include <atomic>
#include <deque>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "etcd/rpc.grpc.pb.h"

namespace keepset::service::etcd {
namespace {

using etcdserverpb::WatchRequest;
using etcdserverpb::WatchResponse;

Change ToChange(mvccpb::Event& event) {
  mvccpb::KeyValue& pair = *event.mutable_kv();
  return {
      .kind = event.type() == mvccpb::Event::DELETE ? Change::Kind::kDelete : Change::Kind::kPut,
      .pair = {.key = std::move(*pair.mutable_key()),
               .value = std::move(*pair.mutable_value()),
               .mod_revision = pair.mod_revision()}};
}

class WatchStreamImpl final : public WatchStream {
 public:
  WatchStreamImpl(Connections::ConnectionPtr connection, absl::string_view first_key,
                  absl::string_view end_key, int64_t first_revision)
      : connection_(std::move(connection)) {
    connection_->Prepare(context_);
    stream_ = etcdserverpb::Watch::NewStub(connection_->channel)->Watch(&context_);
    WatchRequest request;
    etcdserverpb::WatchCreateRequest& create = *request.mutable_create_request();
    create.set_key(std::string(first_key));
    create.set_range_end(std::string(end_key));
    create.set_start_revision(first_revision);
    create.set_progress_notify(true);
    create.set_fragment(true);
    // A stream that broke says so when it is read.
    stream_->Write(request);
  }

  ~WatchStreamImpl() override {
    Cancel();
    WatchResponse dropped;
    while (!finished_ && stream_->Read(&dropped)) {
    }
    if (!finished_) stream_->Finish();
  }

  absl::StatusOr<WatchEvent> Next() override {
    while (events_.empty()) {
      WatchResponse response;
      if (finished_ || !stream_->Read(&response)) return WhyEnded();
      if (absl::Status status = Take(response); !status.ok()) return status;
    }
    WatchEvent event = std::move(events_.front());
    events_.pop_front();
    return event;
  }

  void Cancel() override {
    cancelled_ = true;
    context_.TryCancel();
  }

 private:
  absl::Status WhyEnded() {
    if (!finished_) {
      finished_ = true;
      end_ = connection_->StatusOf("Watch", stream_->Finish());
    }
    if (cancelled_) return absl::CancelledError("etcd: the watch was cancelled");
    if (!end_.ok()) return end_;
    return absl::UnavailableError(
        absl::StrCat("etcd ", connection_->address, ": Watch: ended by the server"));
  }

  absl::Status Take(WatchResponse& response) {
    WatchEvent event;
    event.cluster_id = response.header().cluster_id();
    event.revision = response.header().revision();
    if (response.canceled()) {
      if (response.compact_revision() != 0) {
        event.kind = WatchEvent::Kind::kCompacted;
        event.revision = response.compact_revision();
        events_.push_back(std::move(event));
        return absl::OkStatus();
      }
      const std::string message =
          absl::StrCat("etcd ", connection_->address, ": Watch: ", response.cancel_reason());
      if (absl::StrContains(message, "permission denied")) {
        return absl::PermissionDeniedError(message);
      }
      return absl::UnavailableError(message);
    }
    if (response.created()) {
      event.kind = WatchEvent::Kind::kCreated;
      events_.push_back(std::move(event));
      return absl::OkStatus();
    }
    for (mvccpb::Event& change : *response.mutable_events()) {
      const int64_t revision = change.kv().mod_revision();
      if (open_.revision != revision) CloseRevision();
      open_.kind = WatchEvent::Kind::kChanged;
      open_.cluster_id = event.cluster_id;
      open_.revision = revision;
      open_.changes.push_back(ToChange(change));
    }
    if (response.fragment()) return absl::OkStatus();
    const bool is_progress = open_.changes.empty() && response.events().empty();
    CloseRevision();
    if (is_progress) {
      event.kind = WatchEvent::Kind::kProgress;
      events_.push_back(std::move(event));
    }
    return absl::OkStatus();
  }

  // etcd never spreads a revision over answers other than the fragments of one.
  void CloseRevision() {
    if (!open_.changes.empty()) events_.push_back(std::move(open_));
    open_ = WatchEvent();
  }

  const Connections::ConnectionPtr connection_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<WatchRequest, WatchResponse>> stream_;
  std::atomic<bool> cancelled_ = false;
  bool finished_ = false;
  absl::Status end_;
  WatchEvent open_;  // the revision whose events are still coming
  std::deque<WatchEvent> events_;
};

}  // namespace

std::unique_ptr<WatchStream> NewWatchStream(Connections::ConnectionPtr connection,
                                            absl::string_view first_key, absl::string_view end_key,
                                            int64_t first_revision) {
  return std::make_unique<WatchStreamImpl>(std::move(connection), first_key, end_key,
                                           first_revision);
}

}  // namespace keepset::service::etcd
