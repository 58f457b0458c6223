// keepset.v1.ServerService: what this server is, and draining by RPC.
#ifndef KEEPSET_SERVICE_RPC_SERVER_SERVICE_H_
#define KEEPSET_SERVICE_RPC_SERVER_SERVICE_H_

#include <functional>
#include <memory>

#include "absl/time/time.h"
#include "keepset/v1/server.grpc.pb.h"
#include "service/rpc/admission.h"
#include "service/rpc/work_queue.h"
#include "tables/table_store.h"

namespace keepset::service {

enum class AdminAccess { kDenied, kAllowed };

struct ServerServiceOptions {
  v1::GetServerInfoResponse info;  // without tables and draining, which change
  AdminAccess admin = AdminAccess::kDenied;
  // Refuses new operations and tells health checks; waiting is the service's.
  std::function<void()> start_draining;
};

// `tables`, `admission` and `blocking` (for calls that wait) must outlive the service.
std::unique_ptr<v1::ServerService::CallbackService> NewServerService(
    ServerServiceOptions options, const tables::TableStore& tables, Admission& admission,
    WorkQueue& blocking);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SERVER_SERVICE_H_
