// One Lease call, driven by the thread that calls in: nothing is sent or read in between.
#ifndef KEEPSET_CLIENTS_CPP_LEASE_STREAM_H_
#define KEEPSET_CLIENTS_CPP_LEASE_STREAM_H_

#include <grpcpp/grpcpp.h>

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "keepset/v1/session.grpc.pb.h"

namespace keepset::client {

// One thread at a time.
class LeaseStream {
 public:
  LeaseStream(v1::SessionService::Stub* stub, const std::string& session_id);
  // Cancels the call and waits for its end.
  ~LeaseStream();
  LeaseStream(const LeaseStream&) = delete;
  LeaseStream& operator=(const LeaseStream&) = delete;

  // Sends a beat and waits for its answer until `deadline`, at most until the call has ended.
  void Beat(absl::Time deadline);
  // Reads what has arrived already.
  void Poll();

  // Whether the last beat is.
  bool answered() const { return !answer_due_; }
  // The newest notice; nullopt before the first.
  const std::optional<v1::LeaseNotice>& notice() const { return last_; }
  // Why the call has ended; nullopt while it has not.
  const std::optional<absl::Status>& end() const { return end_; }

 private:
  enum class Event { kStarted, kWritten, kRead, kFinished };
  // What gRPC hands back is the place of the event here.
  void* Tag(Event event) { return &events_[static_cast<size_t>(event)]; }

  // Waits for one event and reacts to it; false when `deadline` passed first.
  bool Step(absl::Time deadline);
  void React(Event event, bool ok);
  void SendDueBeat();
  void Finish();

  std::array<Event, 4> events_ = {Event::kStarted, Event::kWritten, Event::kRead, Event::kFinished};
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  v1::LeaseBeat beat_;
  v1::LeaseNotice incoming_;
  grpc::Status grpc_end_;
  std::unique_ptr<grpc::ClientAsyncReaderWriter<v1::LeaseBeat, v1::LeaseNotice>> call_;
  bool started_ = false;
  bool writing_ = false;
  bool beat_due_ = false;
  bool answer_due_ = false;
  std::optional<v1::LeaseNotice> last_;
  std::optional<absl::Status> end_;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_LEASE_STREAM_H_
