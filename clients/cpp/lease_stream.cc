#include "clients/cpp/lease_stream.h"

#include <utility>

#include "clients/cpp/rpc_status.h"

namespace keepset::client {

LeaseStream::LeaseStream(v1::SessionService::Stub* stub, const std::string& session_id)
    : call_(stub->PrepareAsyncLease(&context_, &queue_)) {
  beat_.set_session_id(session_id);
  call_->StartCall(Tag(Event::kStarted));
}

LeaseStream::~LeaseStream() {
  context_.TryCancel();
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

void LeaseStream::Beat(absl::Time deadline) {
  beat_due_ = answer_due_ = true;
  SendDueBeat();
  while (answer_due_ && !end_.has_value() && Step(deadline)) {
  }
}

void LeaseStream::Poll() {
  // Long past; gRPC takes a time before the epoch for the infinite future.
  while (!end_.has_value() && Step(absl::UnixEpoch())) {
  }
}

bool LeaseStream::Step(absl::Time deadline) {
  void* tag = nullptr;
  bool ok = false;
  if (queue_.AsyncNext(&tag, &ok, absl::ToChronoTime(deadline)) !=
      grpc::CompletionQueue::GOT_EVENT) {
    return false;
  }
  React(*static_cast<const Event*>(tag), ok);
  return true;
}

void LeaseStream::React(Event event, bool ok) {
  switch (event) {
    case Event::kStarted:
      if (!ok) return Finish();
      started_ = true;
      call_->Read(&incoming_, Tag(Event::kRead));
      SendDueBeat();
      return;
    case Event::kWritten:
      // A call that takes no beat has ended; the read tells.
      writing_ = false;
      SendDueBeat();
      return;
    case Event::kRead:
      if (!ok) return Finish();
      last_ = incoming_;
      // A notice that crossed the beat also tells that the server lives.
      answer_due_ = answer_due_ && beat_due_;
      call_->Read(&incoming_, Tag(Event::kRead));
      return;
    case Event::kFinished:
      end_ = FromRpcStatus(grpc_end_);
      return;
  }
}

void LeaseStream::SendDueBeat() {
  if (!started_ || !beat_due_ || writing_) return;
  beat_due_ = false;
  writing_ = true;
  call_->Write(beat_, Tag(Event::kWritten));
}

void LeaseStream::Finish() { call_->Finish(&grpc_end_, Tag(Event::kFinished)); }

}  // namespace keepset::client
