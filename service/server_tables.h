// The table registry of one server with everything around it: state directory, loaders, sources and
// the authority that takes writes. The only place that knows which sources there are.
#ifndef KEEPSET_SERVICE_SERVER_TABLES_H_
#define KEEPSET_SERVICE_SERVER_TABLES_H_

#include <memory>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "keepset/v1/server_config.pb.h"
#include "service/metrics/metrics.h"
#include "service/registry/registry_authority.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"
#include "tables/table_store.h"

namespace keepset::service {

class ServerTables {
 public:
  // Recovers, then starts the sources of `config`. Errors name the field that cannot be used.
  // Everything given outlives the result.
  static absl::StatusOr<std::unique_ptr<ServerTables>> Start(const v1::ServerConfig& config,
                                                             tables::TableStore& store,
                                                             const Clock& clock, Metrics& metrics,
                                                             RegistryObserver& observer);
  virtual ~ServerTables() = default;

  virtual TableRegistry& registry() = 0;
  virtual RegistryAuthority& authority() = 0;
  // For looking at tables that are not kept.
  virtual TableLoader& validator() = 0;
  // Ends the sources; what is loaded stays.
  virtual void Stop() = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_SERVER_TABLES_H_
