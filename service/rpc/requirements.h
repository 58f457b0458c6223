// What a worker has to send for an operation that it describes.
#ifndef KEEPSET_SERVICE_RPC_REQUIREMENTS_H_
#define KEEPSET_SERVICE_RPC_REQUIREMENTS_H_

#include <memory>

#include "absl/status/status.h"
#include "engine/policies/policy_registry.h"
#include "keepset/v1/compression.pb.h"
#include "service/rpc/service_context.h"
#include "tables/decision_table.h"

namespace keepset::service {

// Fills `response` from policy and active table. Errors are those of beginning such an operation.
absl::Status DescribeRequirements(const ServiceContext& context,
                                  const v1::GetRequirementsRequest& request,
                                  v1::GetRequirementsResponse& response);

// What an operation of `table`'s model has to send under the policy that reads tables of its kind,
// with default parameters. NotFound where `policies` has none.
absl::Status DescribeTableRequirements(const engine::PolicyRegistry& policies,
                                       std::shared_ptr<const tables::DecisionTable> table,
                                       v1::GetRequirementsResponse& response);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_REQUIREMENTS_H_
