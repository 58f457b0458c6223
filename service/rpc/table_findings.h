// What TableService.Validate says of a table: whether Load would take it, and what to know before.
#ifndef KEEPSET_SERVICE_RPC_TABLE_FINDINGS_H_
#define KEEPSET_SERVICE_RPC_TABLE_FINDINGS_H_

#include "absl/status/status.h"
#include "keepset/v1/table.pb.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"

namespace keepset::service {

// A refused table is a finding, not an error. Errors: the loaded table asked for is not there, or
// nothing was asked.
absl::Status FindFindings(const v1::ValidateTableRequest& request, const TableRegistry& registry,
                          TableLoader& validator, v1::ValidateTableResponse* response);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_TABLE_FINDINGS_H_
