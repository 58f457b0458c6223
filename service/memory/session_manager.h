// Sessions, their regions and the leases operations hold on them.
//
// A session with a side-socket connection lives as long as that; one without ends when its lease
// runs out. CloseSession, hang-up, expiry, replacement and Shutdown run the same code: no new
// leases, and a region is unmapped with the last lease that operations hold on it (none: at once).
// Unmapping may wait for a device: OnHangUp and ReapExpired hand it on (UnmapLater) and never
// block, nor do Beat, Lease, CheckSession and Counts; whatever registers, retires or closes may.
// Memory of the server's own (AllocateRegion) that was not retired is quarantined instead
// (quarantine.h). Region and session ids are random and mean nothing outside their session.
// Thread-safe.
#ifndef KEEPSET_SERVICE_MEMORY_SESSION_MANAGER_H_
#define KEEPSET_SERVICE_MEMORY_SESSION_MANAGER_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

using SideSocketToken = std::array<uint8_t, 32>;

// Holds a region mapped. Dropping the last lease of a retired region unmaps it. Movable, not
// copyable.
class RegionLease {
 public:
  RegionLease() = default;
  explicit RegionLease(std::shared_ptr<const MappedRegion> region) : region_(std::move(region)) {}
  RegionLease(RegionLease&&) = default;
  RegionLease& operator=(RegionLease&&) = default;

  const MappedRegion& region() const { return *region_; }
  bool valid() const { return region_ != nullptr; }

 private:
  std::shared_ptr<const MappedRegion> region_;
};

struct SessionLimits {
  int64_t max_sessions = 256;
  int64_t max_regions_per_session = 1024;
  uint64_t max_region_bytes_per_session = uint64_t{1} << 40;
  absl::Duration default_lease = absl::Seconds(120);
  absl::Duration max_lease = absl::Minutes(60);
  // Memory of the server's own; 0: none.
  uint64_t max_owned_bytes = uint64_t{1} << 30;
  uint64_t max_owned_bytes_per_session = uint64_t{1} << 28;
  // The device that operations use: memory of a device is made on no other. Empty: on any.
  std::string owned_device_uuid = {};
  // After the end of the worker's process, or of the session where that cannot be watched.
  absl::Duration quarantine = absl::Seconds(60);
};

struct OpenSessionArgs {
  std::string client_uuid;  // 16 bytes
  std::string engine;
  std::string tenant;
  int64_t pid_hint = 0;
  absl::Duration lease = absl::ZeroDuration();  // 0: default
};

struct SessionInfo {
  std::string session_id;
  uint64_t generation = 0;
  absl::Duration lease;
  SideSocketToken token = {};
};

struct RegionInfo {
  std::string region_id;
  std::string name;
  std::string kind;
  uint64_t length = 0;
  RegionAccess access = RegionAccess::kReadOnly;
  uint64_t generation = 0;
  uint64_t owned_bytes = 0;  // allocated here for it; 0: the worker's memory
  bool retiring = false;
  int64_t leases = 0;
};

struct AllocatedRegion {
  RegionInfo info;
  uint64_t offset = 0;     // of the region in its info.owned_bytes
  uint64_t fd_token = 0;   // FetchFd answers the descriptor; 0: ipc_handle
  std::string ipc_handle;  // "cuda_ipc"
};

struct SessionCounts {
  int64_t sessions = 0;
  struct ByKind {
    std::string kind;
    int64_t regions = 0;
    uint64_t bytes = 0;
    uint64_t device_bytes = 0;  // MemoryTransport::DeviceBytes
    uint64_t owned_bytes = 0;   // of the server's own, quarantined_bytes included
    int64_t quarantined_regions = 0;
    uint64_t quarantined_bytes = 0;
  };
  std::vector<ByKind> regions;  // every known kind, zero included
};

// Why a session ended.
enum class SessionEnd { kClosed, kReplaced, kHangUp, kLeaseExpired, kShutdown };

// What quarantined memory waits for, beside the operations that use it.
enum class QuarantineEnd { kNothing, kProcess, kTime };

// What the session room tells metrics and the log; called without locks held, from any thread.
class SessionObserver {
 public:
  virtual ~SessionObserver() = default;
  virtual void OnSessionOpened(const OpenSessionArgs& /*args*/, const SessionInfo& /*info*/) {}
  virtual void OnSessionEnded(absl::string_view /*session_id*/, SessionEnd /*why*/,
                              int64_t /*regions*/) {}
  virtual void OnRegionRegistered(absl::string_view /*session_id*/, const RegionInfo& /*region*/) {}
  virtual void OnRegionRefused(absl::string_view /*kind*/, const absl::Status& /*why*/) {}
  virtual void OnRegionQuarantined(const RegionInfo& /*region*/, QuarantineEnd /*until*/) {}
};

// Runs what it is given once, soon, on a thread that may wait for devices.
using UnmapLater = std::function<void(absl::AnyInvocable<void()> unmap)>;

class SessionManager {
 public:
  // `transports`, `clock` and `observer` must outlive the manager; observer may be nullptr. later:
  // what it is given must have run before the manager's end. Empty: on the caller's thread.
  static std::unique_ptr<SessionManager> New(
      const SessionLimits& limits, std::vector<std::unique_ptr<MemoryTransport>> transports,
      const Clock& clock, SessionObserver* observer, UnmapLater later = {});
  virtual ~SessionManager() = default;

  // The same client_uuid again replaces the session: the old one ends, generation grows.
  // InvalidArgument: uuid not 16 bytes. ResourceExhausted: too many sessions.
  virtual absl::StatusOr<SessionInfo> OpenSession(const OpenSessionArgs& args) = 0;
  // Renews the lease. NotFound: unknown or ended session.
  virtual absl::Status Beat(absl::string_view session_id) = 0;
  virtual absl::Status CloseSession(absl::string_view session_id) = 0;

  // Side socket: redeems a one-time token. process: pidfd of the peer, null where it has none.
  // PermissionDenied: unknown or used.
  virtual absl::StatusOr<std::string> RedeemToken(const SideSocketToken& token,
                                                  std::shared_ptr<const UniqueFd> process) = 0;
  // Stores a passed descriptor until RegisterRegion names its token. ResourceExhausted: too many
  // pending.
  virtual absl::StatusOr<uint64_t> DepositFd(absl::string_view session_id, UniqueFd fd) = 0;
  // The side-socket connection of the session is gone.
  virtual void OnHangUp(absl::string_view session_id) = 0;

  // `fd_token` 0: named transport. NotFound: session, kind or token. InvalidArgument: sizes.
  // AlreadyExists: name taken. ResourceExhausted: quota. The token is spent whatever the answer.
  virtual absl::StatusOr<RegionInfo> RegisterRegion(absl::string_view session_id,
                                                    absl::string_view name, uint64_t fd_token,
                                                    RegionDescriptor descriptor) = 0;
  // Fresh zeroed memory of the server's own as a read-write region. FailedPrecondition: the server
  // gives none, none of this kind, or none of this device. ResourceExhausted: a limit, named.
  // Otherwise the errors of RegisterRegion and MemoryTransport::Create.
  virtual absl::StatusOr<AllocatedRegion> AllocateRegion(absl::string_view session_id,
                                                         absl::string_view name,
                                                         const std::string& kind, uint64_t length,
                                                         const std::string& device_uuid) = 0;
  // Side socket: the descriptor of an AllocatedRegion. NotFound: no such token in this session, or
  // it was used.
  virtual absl::StatusOr<UniqueFd> FetchFd(absl::string_view session_id, uint64_t fd_token) = 0;
  // Waits up to `timeout` for the leases to drop. DeadlineExceeded leaves it retiring. Of a region
  // that is the server's own it is the worker's word that it has unmapped it, and is taken after
  // the end of the session, too.
  virtual absl::Status RetireRegion(absl::string_view session_id, absl::string_view region_id,
                                    absl::Duration timeout) = 0;
  virtual absl::StatusOr<std::vector<RegionInfo>> ListRegions(absl::string_view session_id) = 0;

  // A lease for an operation of this session; also counts as a beat. NotFound: not this session's
  // region (whether or not another session has it). FailedPrecondition: retiring, or it failed
  // Verify.
  virtual absl::StatusOr<RegionLease> Lease(absl::string_view session_id,
                                            absl::string_view region_id) = 0;
  // NotFound for an unknown session; also counts as a beat.
  virtual absl::Status CheckSession(absl::string_view session_id) = 0;

  // Ends sessions whose lease has run out; returns how many. Called by the server's timer thread.
  virtual int64_t ReapExpired() = 0;
  // Frees quarantined memory whose time has come; may wait for devices.
  virtual void SweepQuarantine() = 0;
  virtual SessionCounts Counts() const = 0;
  virtual void Shutdown() = 0;
};

// Every transport of transports.def that `allow` accepts by kind.
std::vector<std::unique_ptr<MemoryTransport>> NewBuiltinTransports(
    const std::function<bool(absl::string_view kind)>& allow);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SESSION_MANAGER_H_
