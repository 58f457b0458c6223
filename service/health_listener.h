// grpc.health.v1, and nothing else, on a TCP address of its own: for probes that reach neither the
// Unix socket nor a TLS port. Answers the same as the main server; no data passes here.
#ifndef KEEPSET_SERVICE_HEALTH_LISTENER_H_
#define KEEPSET_SERVICE_HEALTH_LISTENER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "service/health_board.h"

namespace keepset::service {

class HealthListener {
 public:
  // `address` is host:port, port 0 takes a free one; `board` must outlive the listener.
  // AlreadyExists: the address is in use or not ours.
  static absl::StatusOr<std::unique_ptr<HealthListener>> Start(const std::string& address,
                                                               HealthBoard& board);
  virtual ~HealthListener() = default;

  // The port filled in.
  virtual const std::string& address() const = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_HEALTH_LISTENER_H_
