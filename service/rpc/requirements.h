// What a worker has to send for an operation that it describes.
#ifndef KEEPSET_SERVICE_RPC_REQUIREMENTS_H_
#define KEEPSET_SERVICE_RPC_REQUIREMENTS_H_

#include "absl/status/status.h"
#include "keepset/v1/compression.pb.h"
#include "service/rpc/service_context.h"

namespace keepset::service {

// Fills `response` from policy and active table. Errors are those of beginning such an operation.
absl::Status DescribeRequirements(const ServiceContext& context,
                                  const v1::GetRequirementsRequest& request,
                                  v1::GetRequirementsResponse& response);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_REQUIREMENTS_H_
