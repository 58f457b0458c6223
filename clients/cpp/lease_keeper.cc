#include "clients/cpp/lease_keeper.h"

#include <algorithm>
#include <utility>

namespace keepset::client {
namespace {

// Bounds how long destruction waits for a server that hangs.
constexpr absl::Duration kMaxWrite = absl::Seconds(2);
// A beat that could not be sent before the next one tells of a server that hangs.
constexpr int64_t kMaxWaitingBytes = 0;

}  // namespace

LeaseKeeper::LeaseKeeper(v1::SessionService::Stub* stub, std::string session_id,
                         absl::Duration interval)
    : stub_(stub),
      session_id_(std::move(session_id)),
      interval_(interval),
      thread_([this] { Run(); }) {}

LeaseKeeper::~LeaseKeeper() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

absl::Status LeaseKeeper::status() const {
  absl::MutexLock lock(&mutex_);
  return status_;
}

bool LeaseKeeper::draining() const {
  absl::MutexLock lock(&mutex_);
  return draining_;
}

void LeaseKeeper::Run() {
  v1::LeaseBeat beat;
  beat.set_session_id(session_id_);
  std::unique_ptr<Stream> stream;
  while (true) {
    bool broken;
    {
      absl::MutexLock lock(&mutex_);
      if (absl::IsNotFound(status_)) return;
      broken = std::exchange(stream_broken_, false);
    }
    if (broken) stream.reset();
    if (stream == nullptr) {
      stream = std::make_unique<Stream>(
          kMaxWaitingBytes,
          [this](v1::LeaseNotice& notice) {
            absl::MutexLock lock(&mutex_);
            draining_ = notice.draining();
            status_ = absl::OkStatus();
          },
          [this](absl::Status end) {
            absl::MutexLock lock(&mutex_);
            stream_broken_ = true;
            if (!stopping_) status_ = std::move(end);
          });
      stub_->async()->Lease(stream->context(), stream->reactor());
      stream->Start();
    }
    // The end of a stream that refuses the beat arrives through its callback.
    (void)stream->Write(beat, std::min(interval_, kMaxWrite));
    absl::MutexLock lock(&mutex_);
    if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), interval_)) break;
  }
}

}  // namespace keepset::client
