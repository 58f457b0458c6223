#include "service/rpc/lease_stream_reactor.h"

#include <utility>

#include "service/rpc/wire_status.h"

namespace keepset::service {

class LeaseStreamReactor final : public grpc::ServerBidiReactor<v1::LeaseBeat, v1::LeaseNotice> {
 public:
  LeaseStreamReactor(SessionManager& sessions,
                     std::function<v1::LeaseNotice(const std::string&)> notice_for,
                     OpenLeaseStreams& streams)
      : sessions_(sessions), notice_for_(std::move(notice_for)), streams_(streams) {
    streams_.Add(this);
    absl::MutexLock lock(&mutex_);
    if (!finished_) StartRead(&beat_);
  }

  void OnReadDone(bool ok) override {
    absl::Status status;
    if (ok) status = sessions_.Beat(beat_.session_id());
    absl::MutexLock lock(&mutex_);
    if (finished_) return;
    if (!ok || !status.ok()) {
      FinishOnce(ToGrpcStatus(status));
      return;
    }
    session_id_ = beat_.session_id();
    SendNotice();
    StartRead(&beat_);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (finished_ && !finish_called_) {
      finish_called_ = true;
      Finish(final_status_);
    } else if (ok && notice_due_ && !finished_) {
      SendNotice();
    }
  }

  void OnCancel() override {
    absl::MutexLock lock(&mutex_);
    FinishOnce(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    streams_.Remove(this);
    delete this;
  }

  void Notify() {
    absl::MutexLock lock(&mutex_);
    if (!finished_ && !session_id_.empty()) SendNotice();
  }

  void Close() {
    absl::MutexLock lock(&mutex_);
    FinishOnce({grpc::StatusCode::UNAVAILABLE, "the server is shutting down"});
  }

 private:
  // One write is outstanding; notices that fall due meanwhile become one.
  void SendNotice() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    notice_due_ = writing_;
    if (writing_) return;
    writing_ = true;
    notice_ = notice_for_(session_id_);
    StartWrite(&notice_);
  }

  void FinishOnce(grpc::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finished_) return;
    finished_ = true;
    final_status_ = std::move(status);
    if (writing_) return;
    finish_called_ = true;
    Finish(final_status_);
  }

  SessionManager& sessions_;
  const std::function<v1::LeaseNotice(const std::string&)> notice_for_;
  OpenLeaseStreams& streams_;

  v1::LeaseBeat beat_;  // read side only
  absl::Mutex mutex_;
  v1::LeaseNotice notice_ ABSL_GUARDED_BY(mutex_);
  std::string session_id_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool notice_due_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  bool finish_called_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::Status final_status_ ABSL_GUARDED_BY(mutex_);
};

void OpenLeaseStreams::Add(LeaseStreamReactor* stream) {
  bool closed = false;
  {
    absl::MutexLock lock(&mutex_);
    streams_.insert(stream);
    closed = closed_;
  }
  if (closed) stream->Close();
}

void OpenLeaseStreams::Remove(LeaseStreamReactor* stream) {
  absl::MutexLock lock(&mutex_);
  streams_.erase(stream);
}

// The lock keeps every stream alive while it is told: OnDone removes it first.
void OpenLeaseStreams::NotifyAll() {
  absl::MutexLock lock(&mutex_);
  for (LeaseStreamReactor* stream : streams_) stream->Notify();
}

void OpenLeaseStreams::CloseAll() {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  for (LeaseStreamReactor* stream : streams_) stream->Close();
}

grpc::ServerBidiReactor<v1::LeaseBeat, v1::LeaseNotice>* StartLeaseStream(
    SessionManager& sessions, std::function<v1::LeaseNotice(const std::string&)> notice_for,
    OpenLeaseStreams& streams) {
  return new LeaseStreamReactor(sessions, std::move(notice_for), streams);
}

}  // namespace keepset::service
