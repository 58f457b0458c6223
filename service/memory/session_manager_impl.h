// What SessionManager::New answers, in two files: the life of sessions (session_manager.cc) and
// their regions (session_regions.cc).
#ifndef KEEPSET_SERVICE_MEMORY_SESSION_MANAGER_IMPL_H_
#define KEEPSET_SERVICE_MEMORY_SESSION_MANAGER_IMPL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "service/memory/memory_transport.h"
#include "service/memory/owned_budget.h"
#include "service/memory/quarantine.h"
#include "service/memory/region_table.h"
#include "service/memory/seen_generations.h"
#include "service/memory/session_manager.h"
#include "service/memory/transport_set.h"

namespace keepset::service {

enum class TokenState { kFresh, kRedeemed };

// Guarded by its manager.
struct Session {
  Session(const SessionLimits& limits, const OpenSessionArgs& args)
      : client_uuid(args.client_uuid),
        regions(limits.max_regions_per_session, limits.max_region_bytes_per_session) {}

  const std::string client_uuid;
  SessionInfo info;
  absl::Duration expires_at;  // On Clock::Monotonic.
  TokenState token_state = TokenState::kFresh;
  RegionTable regions;
  const std::shared_ptr<SeenGenerations> seen_generations = std::make_shared<SeenGenerations>();
  absl::flat_hash_map<uint64_t, UniqueFd> pending_fds;
  std::shared_ptr<const UniqueFd> process;  // pidfd; null: cannot be watched
};

// A session that nobody finds any more, and what of its regions is still to do.
struct DetachedSession {
  std::unique_ptr<Session> session;
  struct Quarantined {
    RegionInfo info;
    QuarantineEnd until;
  };
  std::vector<Quarantined> quarantined;
  std::vector<std::shared_ptr<RegionSlot>> to_retire;
  int64_t regions = 0;
};

absl::Status UnknownSession();

class SessionManagerImpl : public SessionManager {
 public:
  SessionManagerImpl(const SessionLimits& limits,
                     std::vector<std::unique_ptr<MemoryTransport>> transports, const Clock& clock,
                     SessionObserver* observer, UnmapLater later)
      : limits_(limits),
        transports_(std::move(transports)),
        clock_(clock),
        observer_(observer),
        later_(std::move(later)),
        owned_(std::make_shared<OwnedBudget>(limits.max_owned_bytes)),
        quarantine_(limits.quarantine) {}
  ~SessionManagerImpl() override { Shutdown(); }

  absl::StatusOr<SessionInfo> OpenSession(const OpenSessionArgs& args) override;
  absl::Status Beat(absl::string_view session_id) override;
  absl::Status CloseSession(absl::string_view session_id) override;
  absl::StatusOr<std::string> RedeemToken(const SideSocketToken& token,
                                          std::shared_ptr<const UniqueFd> process) override;
  absl::StatusOr<uint64_t> DepositFd(absl::string_view session_id, UniqueFd fd) override;
  void OnHangUp(absl::string_view session_id) override;
  absl::StatusOr<RegionInfo> RegisterRegion(absl::string_view session_id, absl::string_view name,
                                            uint64_t fd_token,
                                            RegionDescriptor descriptor) override;
  absl::StatusOr<AllocatedRegion> AllocateRegion(absl::string_view session_id,
                                                 absl::string_view name, const std::string& kind,
                                                 uint64_t length,
                                                 const std::string& device_uuid) override;
  absl::StatusOr<UniqueFd> FetchFd(absl::string_view session_id, uint64_t fd_token) override;
  absl::Status RetireRegion(absl::string_view session_id, absl::string_view region_id,
                            absl::Duration timeout) override;
  absl::StatusOr<std::vector<RegionInfo>> ListRegions(absl::string_view session_id) override;
  absl::StatusOr<RegionLease> Lease(absl::string_view session_id,
                                    absl::string_view region_id) override;
  absl::Status CheckSession(absl::string_view session_id) override { return Beat(session_id); }
  int64_t ReapExpired() override;
  void SweepQuarantine() override { quarantine_.Sweep(clock_.Monotonic()); }
  SessionCounts Counts() const override;
  void Shutdown() override;

 private:
  using SessionPtr = std::unique_ptr<Session>;

  // The session, its lease renewed; nullptr when unknown.
  Session* Touch(absl::string_view session_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the session out of the maps, its regions of ours into quarantine: from here on nobody can
  // lease from it, and no retire misses a region on its way.
  DetachedSession Detach(absl::string_view session_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The one way a session ends; none: nothing to do. Unmapping may take long.
  enum class Unmapping { kHere, kLater };
  void End(DetachedSession ended, SessionEnd why, Unmapping unmapping) ABSL_LOCKS_EXCLUDED(mutex_);

  // Grows over a restart of the server, too.
  uint64_t NextGeneration() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<AllocatedRegion> Allocate(absl::string_view session_id, RegionInfo info,
                                           const std::string& device_uuid)
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<RegionInfo> Register(absl::string_view session_id, absl::string_view name,
                                      uint64_t fd_token, RegionDescriptor descriptor)
      ABSL_LOCKS_EXCLUDED(mutex_);

  const SessionLimits limits_;
  const TransportSet transports_;
  const Clock& clock_;
  SessionObserver* const observer_;
  const UnmapLater later_;
  const std::shared_ptr<OwnedBudget> owned_;
  Quarantine quarantine_;

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, SessionPtr> sessions_ ABSL_GUARDED_BY(mutex_);  // by id
  absl::flat_hash_map<std::string, std::string> ids_by_uuid_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_generation_ ABSL_GUARDED_BY(mutex_) = 0;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SESSION_MANAGER_IMPL_H_
