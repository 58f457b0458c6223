// One open session: id, side-socket connection, lease thread, and its regions. Held by shared_ptr.
// Destruction ends the session on the server. Thread-safe.
#ifndef KEEPSET_CLIENTS_CPP_SESSION_H_
#define KEEPSET_CLIENTS_CPP_SESSION_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "clients/cpp/client.h"
#include "clients/cpp/lease_keeper.h"
#include "clients/cpp/service_mapping.h"
#include "clients/cpp/service_region.h"
#include "clients/cpp/side_socket.h"
#include "keepset/v1/common.pb.h"
#include "keepset/v1/session.grpc.pb.h"

namespace keepset::client {

class Session : public std::enable_shared_from_this<Session> {
 public:
  // `stub` must outlive the session. FailedPrecondition: the server passes no descriptors, so
  // memfd regions are impossible.
  static absl::StatusOr<std::unique_ptr<Session>> Open(v1::SessionService::Stub* stub,
                                                       const ClientOptions& options,
                                                       const std::string& client_uuid);
  ~Session();

  const std::string& id() const { return id_; }
  absl::Status status() const { return lease_->status(); }
  bool draining() const { return lease_->draining(); }

  absl::Status RegisterRegion(const SharedRegion& region, const std::string& name,
                              RegionAccess access);
  absl::Status RegisterRegion(const DeviceRegion& region, const std::string& name,
                              RegionAccess access);
  absl::Status RetireRegion(const std::string& name);
  // As Client::AllocateRegion.
  absl::StatusOr<std::unique_ptr<ServiceRegion>> AllocateRegion(const std::string& name,
                                                                const ServiceMemory& memory);
  // Registers in this session, which replaced `other`, whatever that had; memory of the server's
  // own is lost, and `other` allocates none any more.
  absl::Status AdoptRegions(Session& other);

  // The slice of the registered region that holds [data, data + size_bytes), if any does.
  bool Resolve(const void* data, int64_t size_bytes, v1::RegionSlice* slice) const;

 private:
  struct Region {
    std::variant<const SharedRegion*, const DeviceRegion*, const ServiceRegion*> memory;
    RegionAccess access;
    std::string region_id;
    bool is_retiring = false;  // its memory may be gone: only its name and id are used
  };
  // The mapping of what AllocateRegion answered.
  absl::StatusOr<std::unique_ptr<ServiceMapping>> Map(const ServiceMemory& memory,
                                                      const v1::AllocateRegionResponse& response);
  void Forget(const std::string& name, const std::string& region_id);
  absl::Status Register(v1::RegisterRegionRequest request, const std::string& name, Region region);

  Session(v1::SessionService::Stub* stub, const ClientOptions& options)
      : stub_(stub), call_timeout_(options.call_timeout) {}

  v1::SessionService::Stub* const stub_;
  const absl::Duration call_timeout_;
  std::string id_;
  std::unique_ptr<SideSocket> side_socket_;
  std::unique_ptr<LeaseKeeper> lease_;
  mutable absl::Mutex mutex_;
  // A region of the server's own removes itself under mutex_ before it ends.
  std::map<std::string, Region> regions_ ABSL_GUARDED_BY(mutex_);
  bool is_replaced_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_SESSION_H_
