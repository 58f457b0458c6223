// keepset.v1.SessionService: sessions and regions of workers over the SessionManager.
//
// Calls that map or wait run on their own threads, so that heartbeats never wait behind them.
#ifndef KEEPSET_SERVICE_RPC_SESSION_SERVICE_H_
#define KEEPSET_SERVICE_RPC_SESSION_SERVICE_H_

#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "keepset/v1/session.grpc.pb.h"
#include "service/rpc/service_context.h"

namespace keepset::service {

struct SessionServiceOptions {
  std::string side_socket_path;  // empty: no descriptors can be passed
  absl::Duration default_retire_timeout = absl::Seconds(10);
  absl::Duration max_retire_timeout = absl::Minutes(5);
};

class SessionService : public v1::SessionService::CallbackService {
 public:
  // `registration` runs calls that map and unmap, `retirement` those that wait for operations; both
  // and what `context` refers to must outlive the service.
  static std::unique_ptr<SessionService> New(const ServiceContext& context,
                                             SessionServiceOptions options, WorkQueue& registration,
                                             WorkQueue& retirement);

  // The session ended, however it did.
  virtual void Forget(absl::string_view session_id) = 0;
  // Tells the open lease streams that the server drains.
  virtual void NotifyDraining() = 0;
  // Ends the open lease streams with UNAVAILABLE.
  virtual void CloseStreams() = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SESSION_SERVICE_H_
