// keepset.v1.TableService over the registry. Reads answer from the registry's view; writes go
// through the authority on a thread of their own, are refused unless they are switched on, and
// leave one audit line each, refused or not.
#ifndef KEEPSET_SERVICE_RPC_TABLE_SERVICE_H_
#define KEEPSET_SERVICE_RPC_TABLE_SERVICE_H_

#include <cstdint>
#include <memory>
#include <set>
#include <string>

#include "absl/strings/string_view.h"
#include "base/log.h"
#include "engine/policies/policy_registry.h"
#include "keepset/v1/table.grpc.pb.h"
#include "service/registry/registry_authority.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"
#include "service/rpc/correlation_ids.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {

enum class TableWrites { kDenied, kAllowed };
// Among the writers: every caller on a Unix socket.
inline constexpr absl::string_view kUnixWriter = "unix:";

struct TableServiceOptions {
  TableWrites writes = TableWrites::kDenied;
  // Certificate names, kUnixWriter; empty: every caller.
  std::set<std::string> writers;
  int64_t max_table_bytes = int64_t{64} << 20;  // of one upload
  std::string tables_directory;                 // of LoadTableRequest.path; empty: none
};

// What the service works with; all of it outlives the service.
struct TableServiceContext {
  TableRegistry& registry;
  RegistryAuthority& authority;
  TableLoader& validator;  // of Validate: keeps nothing
  const engine::PolicyRegistry& policies;
  WorkQueue& blocking;  // runs what waits for disks or other servers
  Logger& log;
  CorrelationIds& correlation_ids;
};

class TableService : public v1::TableService::CallbackService {
 public:
  static std::unique_ptr<TableService> New(TableServiceOptions options,
                                           const TableServiceContext& context);

  // Ends the open watches with UNAVAILABLE; later ones too.
  virtual void CloseStreams() = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_TABLE_SERVICE_H_
