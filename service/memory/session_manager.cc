#include "service/memory/session_manager.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "service/memory/random_id.h"
#include "service/memory/region_table.h"
#include "service/memory/seen_generations.h"

namespace keepset::service {
namespace {

constexpr size_t kClientUuidBytes = 16;
constexpr size_t kMaxTextBytes = 256;
constexpr size_t kMaxPendingFds = 64;

enum class TokenState { kFresh, kRedeemed };

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
};

absl::Status CheckText(absl::string_view field, absl::string_view text) {
  if (text.size() <= kMaxTextBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", text.size(), " bytes, want 0..", kMaxTextBytes));
}

absl::Status UnknownSession() {
  return absl::NotFoundError("session_id: no such session, it may have ended; open one");
}

absl::Status UnknownRegion() {
  return absl::NotFoundError("region_id: no such region in this session");
}

class SessionManagerImpl : public SessionManager {
 public:
  SessionManagerImpl(const SessionLimits& limits,
                     std::vector<std::unique_ptr<MemoryTransport>> transports, const Clock& clock,
                     SessionObserver* observer)
      : limits_(limits), transports_(std::move(transports)), clock_(clock), observer_(observer) {}
  ~SessionManagerImpl() override { Shutdown(); }

  absl::StatusOr<SessionInfo> OpenSession(const OpenSessionArgs& args) override;
  absl::Status Beat(absl::string_view session_id) override;
  absl::Status CloseSession(absl::string_view session_id) override;
  absl::StatusOr<std::string> RedeemToken(const SideSocketToken& token) override;
  absl::StatusOr<uint64_t> DepositFd(absl::string_view session_id, UniqueFd fd) override;
  void OnHangUp(absl::string_view session_id) override;
  absl::StatusOr<RegionInfo> RegisterRegion(absl::string_view session_id, absl::string_view name,
                                            uint64_t fd_token,
                                            RegionDescriptor descriptor) override;
  absl::Status RetireRegion(absl::string_view session_id, absl::string_view region_id,
                            absl::Duration timeout) override;
  absl::StatusOr<std::vector<RegionInfo>> ListRegions(absl::string_view session_id) override;
  absl::StatusOr<RegionLease> Lease(absl::string_view session_id,
                                    absl::string_view region_id) override;
  absl::Status CheckSession(absl::string_view session_id) override { return Beat(session_id); }
  int64_t ReapExpired() override;
  SessionCounts Counts() const override;
  void Shutdown() override;

 private:
  using SessionPtr = std::unique_ptr<Session>;

  // The session, its lease renewed; nullptr when unknown.
  Session* Touch(absl::string_view session_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the session out of the maps: from here on nobody can lease from it.
  SessionPtr Detach(absl::string_view session_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The one way a session ends.
  void End(SessionPtr session, SessionEnd why) ABSL_LOCKS_EXCLUDED(mutex_);

  MemoryTransport* FindTransport(absl::string_view kind) const;
  absl::Status UnknownKind(absl::string_view kind) const;
  absl::StatusOr<RegionInfo> Register(absl::string_view session_id, absl::string_view name,
                                      uint64_t fd_token, RegionDescriptor descriptor)
      ABSL_LOCKS_EXCLUDED(mutex_);

  const SessionLimits limits_;
  const std::vector<std::unique_ptr<MemoryTransport>> transports_;
  const Clock& clock_;
  SessionObserver* const observer_;

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, SessionPtr> sessions_ ABSL_GUARDED_BY(mutex_);  // by id
  absl::flat_hash_map<std::string, std::string> ids_by_uuid_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_generation_ ABSL_GUARDED_BY(mutex_) = 0;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
};

Session* SessionManagerImpl::Touch(absl::string_view session_id) {
  const auto it = sessions_.find(session_id);
  if (it == sessions_.end()) return nullptr;
  it->second->expires_at = clock_.Monotonic() + it->second->info.lease;
  return it->second.get();
}

SessionManagerImpl::SessionPtr SessionManagerImpl::Detach(absl::string_view session_id) {
  const auto it = sessions_.find(session_id);
  if (it == sessions_.end()) return nullptr;
  SessionPtr session = std::move(it->second);
  sessions_.erase(it);
  ids_by_uuid_.erase(session->client_uuid);
  return session;
}

void SessionManagerImpl::End(SessionPtr session, SessionEnd why) {
  if (session == nullptr) return;
  const std::vector<std::shared_ptr<RegionSlot>> slots = session->regions.TakeAll();
  for (const auto& slot : slots) slot->Retire();
  session->pending_fds.clear();
  if (observer_ != nullptr) {
    observer_->OnSessionEnded(session->info.session_id, why, static_cast<int64_t>(slots.size()));
  }
}

absl::StatusOr<SessionInfo> SessionManagerImpl::OpenSession(const OpenSessionArgs& args) {
  if (args.client_uuid.size() != kClientUuidBytes) {
    return absl::InvalidArgumentError(absl::StrCat("client_uuid: ", args.client_uuid.size(),
                                                   " bytes, want ", kClientUuidBytes,
                                                   " random ones"));
  }
  KEEPSET_RETURN_IF_ERROR(CheckText("engine", args.engine));
  KEEPSET_RETURN_IF_ERROR(CheckText("tenant", args.tenant));
  if (args.lease < absl::ZeroDuration()) {
    return absl::InvalidArgumentError("lease is negative, want 0 (the default) or more");
  }
  auto session = std::make_unique<Session>(limits_, args);
  SessionInfo& info = session->info;
  KEEPSET_ASSIGN_OR_RETURN(info.session_id, RandomId());
  KEEPSET_RETURN_IF_ERROR(FillRandom(absl::MakeSpan(info.token)));
  info.lease = std::min(args.lease == absl::ZeroDuration() ? limits_.default_lease : args.lease,
                        limits_.max_lease);
  SessionPtr replaced;
  SessionInfo opened;
  {
    absl::MutexLock lock(&mutex_);
    if (shut_down_) return absl::UnavailableError("the server is shutting down");
    const auto old = ids_by_uuid_.find(args.client_uuid);
    if (old != ids_by_uuid_.end()) {
      replaced = Detach(std::string(old->second));
    } else if (static_cast<int64_t>(sessions_.size()) >= limits_.max_sessions) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the server's limit of ", limits_.max_sessions, " sessions is reached"));
    }
    // From the wall clock, so that it also grows over a restart of the server.
    const uint64_t now =
        static_cast<uint64_t>(std::max<int64_t>(absl::ToUnixMicros(clock_.Now()), 0));
    last_generation_ = std::max(last_generation_ + 1, now);
    info.generation = last_generation_;
    session->expires_at = clock_.Monotonic() + info.lease;
    opened = info;
    ids_by_uuid_[args.client_uuid] = opened.session_id;
    sessions_[opened.session_id] = std::move(session);
  }
  End(std::move(replaced), SessionEnd::kReplaced);
  if (observer_ != nullptr) observer_->OnSessionOpened(args, opened);
  return opened;
}

absl::Status SessionManagerImpl::Beat(absl::string_view session_id) {
  absl::MutexLock lock(&mutex_);
  return Touch(session_id) == nullptr ? UnknownSession() : absl::OkStatus();
}

absl::Status SessionManagerImpl::CloseSession(absl::string_view session_id) {
  SessionPtr session;
  {
    absl::MutexLock lock(&mutex_);
    session = Detach(session_id);
  }
  if (session == nullptr) return UnknownSession();
  End(std::move(session), SessionEnd::kClosed);
  return absl::OkStatus();
}

absl::StatusOr<std::string> SessionManagerImpl::RedeemToken(const SideSocketToken& token) {
  std::string session_id;
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [id, session] : sessions_) {
      // Every session is compared, in constant time: how long it takes tells nothing.
      if (ConstantTimeEqual(session->info.token, token) &&
          session->token_state == TokenState::kFresh) {
        session->token_state = TokenState::kRedeemed;
        session_id = id;
      }
    }
    if (!session_id.empty()) Touch(session_id);
  }
  if (session_id.empty()) {
    return absl::PermissionDeniedError("side-socket token: unknown or used");
  }
  return session_id;
}

absl::StatusOr<uint64_t> SessionManagerImpl::DepositFd(absl::string_view session_id, UniqueFd fd) {
  uint64_t token = 0;
  absl::MutexLock lock(&mutex_);
  Session* session = Touch(session_id);
  if (session == nullptr) return UnknownSession();
  if (session->pending_fds.size() >= kMaxPendingFds) {
    return absl::ResourceExhaustedError(absl::StrCat(
        kMaxPendingFds, " descriptors of the session wait for RegisterRegion, register them"));
  }
  while (token == 0 || session->pending_fds.contains(token)) {
    KEEPSET_RETURN_IF_ERROR(
        FillRandom(absl::MakeSpan(reinterpret_cast<uint8_t*>(&token), sizeof(token))));
  }
  session->pending_fds.emplace(token, std::move(fd));
  return token;
}

void SessionManagerImpl::OnHangUp(absl::string_view session_id) {
  SessionPtr session;
  {
    absl::MutexLock lock(&mutex_);
    session = Detach(session_id);
  }
  End(std::move(session), SessionEnd::kHangUp);
}

MemoryTransport* SessionManagerImpl::FindTransport(absl::string_view kind) const {
  for (const auto& transport : transports_) {
    if (transport->kind() == kind) return transport.get();
  }
  return nullptr;
}

absl::Status SessionManagerImpl::UnknownKind(absl::string_view kind) const {
  constexpr absl::string_view kDeviceKinds = "cuda_";
  constexpr size_t kMostEchoed = 32;
  bool has_device = false;
  std::vector<absl::string_view> kinds;
  for (const auto& transport : transports_) {
    kinds.push_back(transport->kind());
    has_device = has_device || absl::StartsWith(transport->kind(), kDeviceKinds);
  }
  const std::string asked =
      absl::StrCat("kind=\"", absl::CHexEscape(kind.substr(0, kMostEchoed)), "\"");
  const std::string taken = absl::StrJoin(kinds, ", ");
  if (absl::StartsWith(kind, kDeviceKinds) && !has_device) {
    return absl::FailedPreconditionError(
        absl::StrCat(asked, ": this server has no device, want a server with backend \"cuda\", or ",
                     "memory of one of: ", taken));
  }
  return absl::NotFoundError(absl::StrCat(asked, ": not taken here, want one of: ", taken));
}

absl::StatusOr<RegionInfo> SessionManagerImpl::RegisterRegion(absl::string_view session_id,
                                                              absl::string_view name,
                                                              uint64_t fd_token,
                                                              RegionDescriptor descriptor) {
  // Only known kinds reach the observer: its labels are bounded.
  const MemoryTransport* transport = FindTransport(descriptor.kind);
  absl::StatusOr<RegionInfo> info = Register(session_id, name, fd_token, std::move(descriptor));
  if (observer_ != nullptr && info.ok()) {
    observer_->OnRegionRegistered(session_id, *info);
  } else if (observer_ != nullptr) {
    observer_->OnRegionRefused(transport == nullptr ? "unknown" : transport->kind(), info.status());
  }
  return info;
}

absl::StatusOr<RegionInfo> SessionManagerImpl::Register(absl::string_view session_id,
                                                        absl::string_view name, uint64_t fd_token,
                                                        RegionDescriptor descriptor) {
  RegionInfo info;
  KEEPSET_ASSIGN_OR_RETURN(info.region_id, RandomId());
  info.name = std::string(name);
  info.kind = descriptor.kind;
  info.length = descriptor.length;
  info.access = descriptor.access;
  info.generation = descriptor.generation;
  MemoryTransport* const transport = FindTransport(descriptor.kind);
  UniqueFd passed;
  {
    absl::MutexLock lock(&mutex_);
    Session* session = Touch(session_id);
    if (session == nullptr) return UnknownSession();
    if (fd_token != 0) {
      const auto it = session->pending_fds.find(fd_token);
      if (it == session->pending_fds.end()) {
        return absl::NotFoundError(
            "fd_token: the session's side socket answered no such token, or it was used");
      }
      // Spent by the call that names it, whatever the answer.
      passed = std::move(it->second);
      session->pending_fds.erase(it);
    }
    if (transport == nullptr) {
      return UnknownKind(info.kind);
    }
    if (transport->needs_fd() != passed.valid()) {
      return absl::InvalidArgumentError(
          absl::StrCat("kind=\"", info.kind, "\" wants ",
                       transport->needs_fd() ? "an fd_token" : "a name or handle and no fd_token"));
    }
    KEEPSET_RETURN_IF_ERROR(session->regions.Reserve(info));
    descriptor.seen_generations = session->seen_generations;
  }
  descriptor.fd = std::move(passed);
  // Mapping may take long; nobody waits for it.
  absl::StatusOr<std::unique_ptr<MappedRegion>> mapping = transport->Open(std::move(descriptor));
  std::shared_ptr<RegionSlot> slot;
  const absl::Status mapped = mapping.status();
  if (mapped.ok()) slot = std::make_shared<RegionSlot>(*std::move(mapping));
  absl::MutexLock lock(&mutex_);
  Session* session = Touch(session_id);
  if (session == nullptr) return UnknownSession();
  if (!mapped.ok()) {
    session->regions.Abort(info.region_id);
    return mapped;
  }
  session->regions.Commit(info.region_id, std::move(slot));
  return info;
}

absl::Status SessionManagerImpl::RetireRegion(absl::string_view session_id,
                                              absl::string_view region_id, absl::Duration timeout) {
  std::shared_ptr<RegionSlot> slot;
  {
    absl::MutexLock lock(&mutex_);
    Session* session = Touch(session_id);
    if (session == nullptr) return UnknownSession();
    slot = session->regions.Find(region_id);
  }
  if (slot == nullptr) return UnknownRegion();
  slot->Retire();
  if (!slot->AwaitUnmapped(timeout)) {
    return absl::DeadlineExceededError(
        absl::StrCat("the region is in use by ", slot->leases(),
                     " operations and stays retiring, ask again before freeing it"));
  }
  absl::MutexLock lock(&mutex_);
  Session* session = Touch(session_id);
  if (session != nullptr) session->regions.Forget(region_id);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<RegionInfo>> SessionManagerImpl::ListRegions(
    absl::string_view session_id) {
  absl::MutexLock lock(&mutex_);
  Session* session = Touch(session_id);
  if (session == nullptr) return UnknownSession();
  return session->regions.List();
}

absl::StatusOr<RegionLease> SessionManagerImpl::Lease(absl::string_view session_id,
                                                      absl::string_view region_id) {
  std::shared_ptr<RegionSlot> slot;
  {
    absl::MutexLock lock(&mutex_);
    Session* session = Touch(session_id);
    if (session == nullptr) return UnknownSession();
    slot = session->regions.Find(region_id);
  }
  if (slot == nullptr || slot->unmapped()) return UnknownRegion();
  RegionLease lease = slot->Acquire();
  if (!lease.valid()) {
    return absl::FailedPreconditionError("region_id: the region is being retired");
  }
  KEEPSET_RETURN_IF_ERROR(lease.region().Verify());
  return lease;
}

int64_t SessionManagerImpl::ReapExpired() {
  std::vector<SessionPtr> expired;
  {
    absl::MutexLock lock(&mutex_);
    const absl::Duration now = clock_.Monotonic();
    std::vector<std::string> ids;
    for (const auto& [id, session] : sessions_) {
      // A redeemed token means a side-socket connection, whose hang-up ends the session.
      if (session->token_state == TokenState::kFresh && session->expires_at <= now) {
        ids.push_back(id);
      }
    }
    for (const std::string& id : ids) expired.push_back(Detach(id));
  }
  const int64_t count = static_cast<int64_t>(expired.size());
  for (SessionPtr& session : expired) End(std::move(session), SessionEnd::kLeaseExpired);
  return count;
}

SessionCounts SessionManagerImpl::Counts() const {
  SessionCounts counts;
  for (const auto& transport : transports_) {
    SessionCounts::ByKind kind;
    kind.kind = std::string(transport->kind());
    kind.device_bytes = transport->DeviceBytes();
    counts.regions.push_back(std::move(kind));
  }
  absl::MutexLock lock(&mutex_);
  counts.sessions = static_cast<int64_t>(sessions_.size());
  for (const auto& [id, session] : sessions_) session->regions.CountInto(counts.regions);
  return counts;
}

void SessionManagerImpl::Shutdown() {
  absl::flat_hash_map<std::string, SessionPtr> sessions;
  {
    absl::MutexLock lock(&mutex_);
    shut_down_ = true;
    sessions.swap(sessions_);
    ids_by_uuid_.clear();
  }
  for (auto& [id, session] : sessions) End(std::move(session), SessionEnd::kShutdown);
}

}  // namespace

std::unique_ptr<SessionManager> SessionManager::New(
    const SessionLimits& limits, std::vector<std::unique_ptr<MemoryTransport>> transports,
    const Clock& clock, SessionObserver* observer) {
  return std::make_unique<SessionManagerImpl>(limits, std::move(transports), clock, observer);
}

}  // namespace keepset::service
