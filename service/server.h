// keepsetd as an object: wires every room, listens, drains. Usable in process by tests.
//
// The only place that knows concrete backends, policies, transports and sources.
#ifndef KEEPSET_SERVICE_SERVER_H_
#define KEEPSET_SERVICE_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/log.h"
#include "keepset/v1/server_config.pb.h"
#include "kernels/compute_backend.h"

namespace keepset::service {

absl::string_view ServerVersion();

class Server {
 public:
  // What a server stands on. Clock and log must outlive it.
  struct Surroundings {
    const Clock& clock;
    Logger& log;
    uint64_t random_seed = 0;  // of correlation ids
    // nullptr: the backend named in the configuration.
    std::unique_ptr<kernels::ComputeBackend> backend;
    // Called once, from a thread of the server, when the backend's device failed: the server
    // drains, and the process has to end. May be empty.
    std::function<void()> on_device_fault = {};
  };

  // Serves when it returns. AlreadyExists: an address is in use. InvalidArgument, NotFound,
  // PermissionDenied, FailedPrecondition: a file, directory or name of the configuration cannot be
  // used. `config` is resolved (ResolveServerConfig).
  static absl::StatusOr<std::unique_ptr<Server>> Start(const v1::ServerConfig& config,
                                                       Surroundings surroundings);
  // Ends without waiting for operations that wait; those that run are finished.
  virtual ~Server() = default;

  // Bound addresses in the order of config.listen, ports filled in.
  virtual const std::vector<std::string>& addresses() const = 0;
  virtual const std::string& side_socket() const = 0;      // empty: none
  virtual const std::string& metrics_address() const = 0;  // empty: none
  virtual const std::string& health_address() const = 0;   // of health_listen; empty: none
  // The metrics page.
  virtual std::string RenderMetrics() const = 0;

  // Health says not serving, new operations are UNAVAILABLE, open ones go on.
  virtual void StartDraining() = 0;
  // False when operations still run, or workers have not retired device memory of the server's
  // own, after `timeout`. Memory of a failed device is not waited for.
  virtual bool WaitIdle(absl::Duration timeout) = 0;
  virtual int64_t operations_running() const = 0;
  // What the destructor does, the memory of sessions left as it is. Idempotent, of one thread.
  virtual void Stop() = 0;
  // Device memory of the server's own that workers may have open. Freeing it, as the destructor
  // does, is undefined then; the end of the process is not.
  virtual uint64_t exported_device_bytes() const = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_SERVER_H_
