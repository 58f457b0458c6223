#include "service/rpc/table_watch_reactor.h"

#include <list>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "service/rpc/table_codec.h"
#include "service/rpc/wire_status.h"

namespace keepset::service {
namespace {

using ViewPtr = std::shared_ptr<const RegistryView>;

absl::Status CheckRequest(const v1::WatchTablesRequest& request) {
  if (!request.has_until_active()) return absl::OkStatus();
  const v1::TableRef& until = request.until_active();
  if (!until.alias().empty() || (until.version().empty() && until.digest().empty())) {
    return absl::InvalidArgumentError("until_active: want a version or digest, and no alias");
  }
  if (until.digest().empty() && until.name().empty()) {
    return absl::InvalidArgumentError("until_active: want a name beside a version");
  }
  return absl::OkStatus();
}

bool IsActiveIn(const RegistryView& view, const v1::TableRef& ref) {
  for (const auto& [name, line] : view.lines) {
    if (!ref.name().empty() && ref.name() != name) continue;
    const std::optional<TableTarget>& active = line->assignment.active;
    if (!active.has_value()) continue;
    if ((ref.version().empty() || ref.version() == active->version) &&
        (ref.digest().empty() || ref.digest() == active->digest)) {
      return true;
    }
  }
  return false;
}

class TableWatchReactor final : public grpc::ServerWriteReactor<v1::WatchTablesResponse>,
                                public std::enable_shared_from_this<TableWatchReactor> {
 public:
  TableWatchReactor(const v1::WatchTablesRequest& request, TableRegistry& registry,
                    OpenStreams& streams)
      : request_(request), registry_(registry), streams_(streams) {}

  void Begin() {
    self_ = shared_from_this();
    stream_ = streams_.Add([weak = weak_from_this()] {
      if (const auto reactor = weak.lock()) reactor->Close();
    });
    if (const absl::Status bad = CheckRequest(request_); !bad.ok()) {
      absl::MutexLock lock(&mutex_);
      FinishOnce(ToGrpcStatus(bad));
      return;
    }
    const ViewPtr first = registry_.Subscribe(&subscription_, [this](ViewPtr view) {
      absl::MutexLock lock(&mutex_);
      latest_ = std::move(view);
      Advance();
    });
    subscribed_ = true;
    absl::MutexLock lock(&mutex_);
    // A change may have come in between.
    if (latest_ == nullptr) latest_ = first;
    Advance();
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (finished_) {
      FinishNow();
    } else if (!ok) {
      FinishOnce(grpc::Status::CANCELLED);
    } else {
      Advance();
    }
  }

  void OnCancel() override {
    absl::MutexLock lock(&mutex_);
    FinishOnce(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    if (subscribed_) registry_.Unsubscribe(subscription_);
    streams_.Remove(stream_);
    const std::shared_ptr<TableWatchReactor> last = std::move(self_);
  }

 private:
  void Close() {
    absl::MutexLock lock(&mutex_);
    FinishOnce({grpc::StatusCode::UNAVAILABLE, "the server is shutting down"});
  }

  bool IsWanted(const std::string& name) const {
    return request_.name().empty() || request_.name() == name;
  }

  // Writes what `latest_` has over what was sent; ends the stream when its wish is fulfilled.
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_) return;
    if (latest_ != sent_) {
      const bool worth_a_message = FillMessage();
      sent_ = latest_;
      if (worth_a_message) {
        writing_ = true;
        StartWrite(&message_);
        return;
      }
    }
    if (request_.has_until_active() && sent_ != nullptr &&
        IsActiveIn(*sent_, request_.until_active())) {
      FinishOnce(grpc::Status::OK);
    }
  }

  bool FillMessage() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    message_.Clear();
    message_.set_revision(ShownRevision(*latest_));
    message_.set_complete(sent_ == nullptr);
    for (const auto& [name, line] : latest_->lines) {
      if (!IsWanted(name)) continue;
      if (sent_ != nullptr) {
        const auto old = sent_->lines.find(name);
        if (old != sent_->lines.end() && old->second == line) continue;
      }
      EncodeLine(*line, message_.add_lines());
    }
    if (sent_ != nullptr) {
      for (const auto& [name, line] : sent_->lines) {
        if (IsWanted(name) && !latest_->lines.contains(name)) message_.add_removed(name);
      }
    }
    if (sent_ == nullptr || sent_->sources != latest_->sources) {
      for (const SourceView& source : latest_->sources) {
        EncodeSource(source, message_.add_sources());
      }
    }
    return message_.complete() || message_.lines_size() > 0 || message_.removed_size() > 0 ||
           message_.sources_size() > 0;
  }

  void FinishOnce(grpc::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finished_) return;
    finished_ = true;
    final_status_ = std::move(status);
    if (!writing_) FinishNow();
  }

  void FinishNow() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finish_called_) return;
    finish_called_ = true;
    Finish(final_status_);
  }

  const v1::WatchTablesRequest request_;
  TableRegistry& registry_;
  OpenStreams& streams_;
  std::list<OpenStreams::Closer>::iterator stream_;
  std::shared_ptr<TableWatchReactor> self_;  // gRPC's reference; dropped in OnDone
  uint64_t subscription_ = 0;
  bool subscribed_ = false;

  absl::Mutex mutex_;
  v1::WatchTablesResponse message_ ABSL_GUARDED_BY(mutex_);
  ViewPtr latest_ ABSL_GUARDED_BY(mutex_);
  ViewPtr sent_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  bool finish_called_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::Status final_status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

grpc::ServerWriteReactor<v1::WatchTablesResponse>* StartTableWatch(
    const v1::WatchTablesRequest& request, TableRegistry& registry, OpenStreams& streams) {
  const auto reactor = std::make_shared<TableWatchReactor>(request, registry, streams);
  reactor->Begin();
  return reactor.get();
}

}  // namespace keepset::service
