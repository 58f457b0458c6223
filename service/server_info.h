// What GetServerInfo says of a server that does not change while it lives.
#ifndef KEEPSET_SERVICE_SERVER_INFO_H_
#define KEEPSET_SERVICE_SERVER_INFO_H_

#include <string>
#include <vector>

#include "keepset/v1/server.pb.h"
#include "keepset/v1/server_config.pb.h"
#include "kernels/compute_backend.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

// What one transport beside inline takes.
struct TransportSupport {
  std::string kind;
  std::vector<DeviceSupport> devices;
};

// `config` is resolved. Tables and draining are left to the service.
v1::GetServerInfoResponse DescribeServer(const v1::ServerConfig& config,
                                         const kernels::ComputeBackend& backend,
                                         const std::vector<std::string>& policies,
                                         const std::vector<TransportSupport>& transports);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_SERVER_INFO_H_
