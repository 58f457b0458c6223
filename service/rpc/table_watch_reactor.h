// One TableService.Watch: the registry's state, then what changed, one message at a time.
#ifndef KEEPSET_SERVICE_RPC_TABLE_WATCH_REACTOR_H_
#define KEEPSET_SERVICE_RPC_TABLE_WATCH_REACTOR_H_

#include <grpcpp/support/server_callback.h>

#include "keepset/v1/table.pb.h"
#include "service/registry/table_registry.h"
#include "service/rpc/open_streams.h"

namespace keepset::service {

// Owns itself until the stream ends. A reader that is slow gets the difference to the newest state,
// so that what waits for it never grows. `registry` and `streams` outlive it.
grpc::ServerWriteReactor<v1::WatchTablesResponse>* StartTableWatch(
    const v1::WatchTablesRequest& request, TableRegistry& registry, OpenStreams& streams);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_TABLE_WATCH_REACTOR_H_
