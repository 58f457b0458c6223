// Writes of TableService in a fleet: a wish is checked against what etcd holds, written there under
// the condition that nobody else changed the line meanwhile, and answered when the watch has
// brought it back into this server's registry.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_AUTHORITY_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_AUTHORITY_H_

#include <memory>

#include "service/registry/etcd/etcd_client.h"
#include "service/registry/etcd/etcd_replica.h"
#include "service/registry/etcd/etcd_tables.h"
#include "service/registry/registry_authority.h"
#include "service/registry/table_source.h"

namespace keepset::service::etcd {

// All outlive the authority.
std::unique_ptr<RegistryAuthority> NewEtcdAuthority(const TablesOptions& options, Client& client,
                                                    EtcdReplica& replica,
                                                    const TableSourceContext& context);

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_AUTHORITY_H_
