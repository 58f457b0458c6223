// keepset.v1.ServerService: what this server is, what it has done, and draining by RPC.
#ifndef KEEPSET_SERVICE_RPC_SERVER_SERVICE_H_
#define KEEPSET_SERVICE_RPC_SERVER_SERVICE_H_

#include <functional>
#include <memory>

#include "keepset/v1/server.grpc.pb.h"
#include "service/rpc/service_context.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {

enum class AdminAccess { kDenied, kAllowed };

struct ServerServiceOptions {
  v1::GetServerInfoResponse info;  // without tables and draining, which change
  AdminAccess admin = AdminAccess::kDenied;
  // Refuses new operations and tells health checks; waiting is the service's.
  std::function<void()> start_draining;
};

// What `context` names and `blocking` (for calls that wait) must outlive the service. Its uptime
// counts from here.
std::unique_ptr<v1::ServerService::CallbackService> NewServerService(ServerServiceOptions options,
                                                                     const ServiceContext& context,
                                                                     WorkQueue& blocking);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SERVER_SERVICE_H_
