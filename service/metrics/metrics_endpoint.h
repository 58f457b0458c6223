// The HTTP listener of the metrics page, on its own port and its own two threads.
#ifndef KEEPSET_SERVICE_METRICS_METRICS_ENDPOINT_H_
#define KEEPSET_SERVICE_METRICS_METRICS_ENDPOINT_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "prometheus/collectable.h"

namespace keepset::service {

class MetricsEndpoint {
 public:
  // Listens on "host:port" (an IPv6 host in brackets, port 0: a free one) and serves `page` at
  // /metrics for as long as it lives; the caller keeps `page` alive. InvalidArgument: not such an
  // address. AlreadyExists: the port is taken. PermissionDenied: a port this user may not bind.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Start(
      const std::string& address, const std::weak_ptr<prometheus::Collectable>& page);

  // Closes the port and joins its threads.
  virtual ~MetricsEndpoint() = default;

  virtual const std::string& address() const = 0;  // the bound "host:port"
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_METRICS_METRICS_ENDPOINT_H_
