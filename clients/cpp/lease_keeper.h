// Renews a session's lease from a thread of its own until it is destroyed. A broken lease stream is
// opened again at the next beat; a session the server does not know any more stays lost.
#ifndef KEEPSET_CLIENTS_CPP_LEASE_KEEPER_H_
#define KEEPSET_CLIENTS_CPP_LEASE_KEEPER_H_

#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "clients/cpp/bidi_stream.h"
#include "keepset/v1/session.grpc.pb.h"

namespace keepset::client {

// Thread-safe.
class LeaseKeeper {
 public:
  // `stub` must outlive the keeper.
  LeaseKeeper(v1::SessionService::Stub* stub, std::string session_id, absl::Duration interval);
  ~LeaseKeeper();
  LeaseKeeper(const LeaseKeeper&) = delete;
  LeaseKeeper& operator=(const LeaseKeeper&) = delete;

  // OK while beats go through; NotFound once the session is lost.
  absl::Status status() const;
  // The server said that it is shutting down.
  bool draining() const;

 private:
  using Stream = BidiStream<v1::LeaseBeat, v1::LeaseNotice>;

  void Run();

  v1::SessionService::Stub* const stub_;
  const std::string session_id_;
  const absl::Duration interval_;
  mutable absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool stream_broken_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_LEASE_KEEPER_H_
