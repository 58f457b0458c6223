// The heartbeat stream of a session: every beat renews the lease and is answered with a notice.
#ifndef KEEPSET_SERVICE_RPC_LEASE_STREAM_REACTOR_H_
#define KEEPSET_SERVICE_RPC_LEASE_STREAM_REACTOR_H_

#include <grpcpp/support/server_callback.h>

#include <functional>
#include <set>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "keepset/v1/session.pb.h"
#include "service/memory/session_manager.h"

namespace keepset::service {

class LeaseStreamReactor;

// The lease streams that are open now. Thread-safe.
class OpenLeaseStreams {
 public:
  void Add(LeaseStreamReactor* stream);
  void Remove(LeaseStreamReactor* stream);
  // Sends every stream a notice outside the rhythm of its beats.
  void NotifyAll();
  void CloseAll();

 private:
  absl::Mutex mutex_;
  std::set<LeaseStreamReactor*> streams_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
};

// The reactor deletes itself when the stream is done. An unknown session ends the stream with
// NOT_FOUND.
grpc::ServerBidiReactor<v1::LeaseBeat, v1::LeaseNotice>* StartLeaseStream(
    SessionManager& sessions, std::function<v1::LeaseNotice(const std::string&)> notice_for,
    OpenLeaseStreams& streams);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_LEASE_STREAM_REACTOR_H_
