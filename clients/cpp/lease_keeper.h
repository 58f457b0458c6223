// Renews a session's lease from a thread of its own until it is destroyed. A broken lease stream is
// opened again at the next beat; a session the server does not know any more stays lost.
//
// Between beats no thread reads from the connection: a thread that waits inside gRPC would be woken
// for every reply to the worker's calls, and hand it over. Whoever asks for the state looks whether
// something has arrived.
#ifndef KEEPSET_CLIENTS_CPP_LEASE_KEEPER_H_
#define KEEPSET_CLIENTS_CPP_LEASE_KEEPER_H_

#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "keepset/v1/session.grpc.pb.h"

namespace keepset::client {

class LeaseStream;

// Thread-safe.
class LeaseKeeper {
 public:
  // `stub` must outlive the keeper.
  LeaseKeeper(v1::SessionService::Stub* stub, std::string session_id, absl::Duration interval);
  ~LeaseKeeper();
  LeaseKeeper(const LeaseKeeper&) = delete;
  LeaseKeeper& operator=(const LeaseKeeper&) = delete;

  // OK while beats go through; NotFound once the session is lost. Does not wait.
  absl::Status status() const;
  // The server said that it is shutting down. Does not wait.
  bool draining() const;

 private:
  void Run();
  // One beat and its answer.
  void Beat() ABSL_EXCLUSIVE_LOCKS_REQUIRED(stream_mutex_);
  // Takes over what the stream has heard.
  void Note() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(stream_mutex_);
  void LookForNews() const;

  v1::SessionService::Stub* const stub_;
  const std::string session_id_;
  const absl::Duration interval_;
  // Held by the thread that polls the stream; taken before mutex_.
  mutable absl::Mutex stream_mutex_;
  std::unique_ptr<LeaseStream> stream_ ABSL_GUARDED_BY(stream_mutex_);
  mutable absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  mutable bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  mutable absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_LEASE_KEEPER_H_
