// Connections to the endpoints of one etcd cluster: how to reach them, who we are there, and which
// of them answers. Private to this folder: gRPC and etcd's wire types stay in it.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_CONNECTION_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_CONNECTION_H_

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "service/registry/etcd/etcd_client.h"

namespace keepset::service::etcd {

struct Endpoint {
  enum class Security { kPlain, kTls };
  std::string address;  // host:port
  Security security = Security::kPlain;
};

// InvalidArgument as NewClient says.
absl::StatusOr<std::vector<Endpoint>> ParseEndpoints(const ClientOptions& options);

// One channel to one endpoint, logged in. Immutable.
struct Connection {
  std::string address;
  std::shared_ptr<grpc::Channel> channel;
  std::string token;  // empty: no login

  void Prepare(grpc::ClientContext& context) const;
  // `status` with "etcd <address>: <call>: " before its message.
  absl::Status StatusOf(absl::string_view call, const grpc::Status& status) const;
};

// No endpoint answered, or this one lost its cluster: another one may.
bool IsUnreachable(const absl::Status& status);

// Thread-safe.
class Connections {
 public:
  using Attempt =
      std::function<grpc::Status(const Connection& connection, grpc::ClientContext& context)>;
  using ConnectionPtr = std::shared_ptr<const Connection>;

  Connections(const ClientOptions& options, std::vector<Endpoint> endpoints)
      : options_(options), endpoints_(std::move(endpoints)) {}

  // Runs `attempt` with a deadline where the last call succeeded, then at each other endpoint,
  // until one answers; logs in again once when the token is refused. Gives the connection that
  // answered. `attempt` may run several times and must not mind.
  absl::StatusOr<ConnectionPtr> Call(absl::string_view name, const Attempt& attempt);
  // Runs `attempt` once, on `connection` and nowhere else.
  absl::Status CallOnce(absl::string_view name, const Connection& connection,
                        const Attempt& attempt);

  void UseNextEndpoint();
  void Shutdown();

 private:
  struct Current {
    ConnectionPtr connection;
    enum class Age { kNew, kUsed } age = Age::kNew;
  };

  // The connection in use, or a new one to the endpoint whose turn it is.
  absl::StatusOr<Current> Acquire();
  absl::StatusOr<ConnectionPtr> Connect(const Endpoint& endpoint);
  absl::StatusOr<std::string> LogIn(const Connection& connection);
  enum class Next { kSameEndpoint, kNextEndpoint };
  void Drop(const ConnectionPtr& connection, Next next);

  const ClientOptions options_;
  const std::vector<Endpoint> endpoints_;

  absl::Mutex mutex_;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
  size_t turn_ ABSL_GUARDED_BY(mutex_) = 0;
  ConnectionPtr connection_ ABSL_GUARDED_BY(mutex_);
  std::set<grpc::ClientContext*> running_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_CONNECTION_H_
