// A watch on an open connection. Private to this folder.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_WATCH_STREAM_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_WATCH_STREAM_H_

#include <cstdint>
#include <memory>

#include "absl/strings/string_view.h"
#include "service/registry/etcd/etcd_client.h"
#include "service/registry/etcd/etcd_connection.h"

namespace keepset::service::etcd {

// Keys in [first_key, end_key).
std::unique_ptr<WatchStream> NewWatchStream(Connections::ConnectionPtr connection,
                                            absl::string_view first_key, absl::string_view end_key,
                                            int64_t first_revision);

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_WATCH_STREAM_H_
