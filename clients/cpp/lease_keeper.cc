#include "clients/cpp/lease_keeper.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/lease_stream.h"

namespace keepset::client {
namespace {

// How long the answer to a beat is waited for; one that comes later is found by whoever looks next.
// Bounds how long destruction waits for a server that hangs.
constexpr absl::Duration kMaxWait = absl::Seconds(2);

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
  LookForNews();
  absl::MutexLock lock(&mutex_);
  return status_;
}

bool LeaseKeeper::draining() const {
  LookForNews();
  absl::MutexLock lock(&mutex_);
  return draining_;
}

// A beat that is under way brings the news itself.
void LeaseKeeper::LookForNews() const {
  if (!stream_mutex_.TryLock()) return;
  if (stream_ != nullptr) {
    stream_->Poll();
    Note();
  }
  stream_mutex_.Unlock();
}

void LeaseKeeper::Note() const {
  absl::MutexLock lock(&mutex_);
  if (stream_->notice().has_value()) draining_ = stream_->notice()->draining();
  if (stream_->end().has_value()) {
    status_ = *stream_->end();
  } else if (stream_->notice().has_value()) {
    status_ = absl::OkStatus();
  }
}

void LeaseKeeper::Beat() {
  bool hangs = false;
  if (stream_ != nullptr) {
    stream_->Poll();
    Note();
    hangs = !stream_->end().has_value() && !stream_->answered();
    if (hangs || stream_->end().has_value()) stream_ = nullptr;
  }
  if (hangs) {
    absl::MutexLock lock(&mutex_);
    status_ = absl::DeadlineExceededError(absl::StrCat("session lease: no answer to a beat within ",
                                                       absl::FormatDuration(interval_)));
  }
  if (stream_ == nullptr) stream_ = std::make_unique<LeaseStream>(stub_, session_id_);
  stream_->Beat(absl::Now() + std::min(interval_, kMaxWait));
  Note();
}

void LeaseKeeper::Run() {
  while (true) {
    {
      absl::MutexLock lock(&stream_mutex_);
      Beat();
    }
    absl::MutexLock lock(&mutex_);
    if (absl::IsNotFound(status_)) return;
    if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), interval_)) return;
  }
}

}  // namespace keepset::client
