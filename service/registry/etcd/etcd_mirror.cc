#include "service/registry/etcd/etcd_mirror.h"

#include <algorithm>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "base/status_macros.h"

namespace keepset::service::etcd {

Mirror::Mirror(const MirrorOptions& options, Client& client, MirrorListener& listener)
    : options_(options),
      client_(client),
      listener_(listener),
      random_(static_cast<std::minstd_rand::result_type>(options.seed % 0x7ffffffe + 1)) {}

Mirror::~Mirror() { Stop(); }

void Mirror::Start() {
  thread_ = std::thread([this] { Run(); });
}

void Mirror::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopped_ = true;
    if (stream_ != nullptr) stream_->Cancel();
  }
  client_.Shutdown();
  if (thread_.joinable()) thread_.join();
}

void Mirror::Run() {
  absl::Duration pause = options_.first_pause;
  while (true) {
    const absl::Status end = Follow();
    if (IsStopped()) return;
    if (told_ == Told::kInStep) pause = options_.first_pause;
    if (!end.ok()) {
      if (told_ != Told::kLost) listener_.OnLost(end);
      told_ = Told::kLost;
      client_.UseNextEndpoint();
    }
    if (!Pause(pause)) return;
    pause = std::min(2 * pause, options_.last_pause);
  }
}

absl::Status Mirror::Follow() {
  if (must_read_) KEEPSET_RETURN_IF_ERROR(ReadAll());
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<WatchStream> stream,
                           client_.Watch(options_.prefix, revision_ + 1));
  {
    absl::MutexLock lock(&mutex_);
    if (stopped_) return absl::OkStatus();
    stream_ = stream.get();
  }
  const absl::Cleanup forget = [this] {
    absl::MutexLock lock(&mutex_);
    stream_ = nullptr;
  };
  while (true) {
    KEEPSET_ASSIGN_OR_RETURN(const WatchEvent event, stream->Next());
    KEEPSET_RETURN_IF_ERROR(Take(event));
    if (must_read_) return absl::OkStatus();
  }
}

absl::Status Mirror::ReadAll() {
  KEEPSET_ASSIGN_OR_RETURN(const RangeResult all, client_.ReadPrefix(options_.prefix));
  if (IsStopped()) return absl::OkStatus();
  listener_.OnRead(all);
  cluster_id_ = all.cluster_id;
  revision_ = all.revision;
  must_read_ = false;
  // Contact was made: a watch that fails now is a loss of its own.
  told_ = Told::kNothing;
  return absl::OkStatus();
}

absl::Status Mirror::Take(const WatchEvent& event) {
  switch (event.kind) {
    case WatchEvent::Kind::kCreated:
      // A watch from a revision to come would stand and be silent.
      if (event.cluster_id != cluster_id_ || event.revision < revision_) {
        must_read_ = true;
        return absl::OkStatus();
      }
      if (told_ != Told::kInStep) listener_.OnInStep();
      told_ = Told::kInStep;
      return absl::OkStatus();
    case WatchEvent::Kind::kChanged:
      if (event.revision <= revision_) return absl::OkStatus();
      listener_.OnChanged(event.revision, event.changes);
      revision_ = event.revision;
      return absl::OkStatus();
    case WatchEvent::Kind::kProgress:
      revision_ = std::max(revision_, event.revision);
      return absl::OkStatus();
    case WatchEvent::Kind::kCompacted:
      must_read_ = true;
      return absl::OkStatus();
  }
  return absl::InternalError("etcd: a watch event of no kind");
}

bool Mirror::Pause(absl::Duration longest) {
  const double share = std::uniform_real_distribution<double>(0.5, 1.0)(random_);
  absl::MutexLock lock(&mutex_);
  return !mutex_.AwaitWithTimeout(absl::Condition(&stopped_), share * longest);
}

bool Mirror::IsStopped() {
  absl::MutexLock lock(&mutex_);
  return stopped_;
}

}  // namespace keepset::service::etcd
