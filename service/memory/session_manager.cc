#include "service/memory/session_manager.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "service/memory/random_id.h"
#include "service/memory/session_manager_impl.h"

namespace keepset::service {
namespace {

constexpr size_t kClientUuidBytes = 16;
constexpr size_t kMaxTextBytes = 256;

absl::Status CheckText(absl::string_view field, absl::string_view text) {
  if (text.size() <= kMaxTextBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", text.size(), " bytes, want 0..", kMaxTextBytes));
}

}  // namespace

absl::Status UnknownSession() {
  return absl::NotFoundError("session_id: no such session, it may have ended; open one");
}

Session* SessionManagerImpl::Touch(absl::string_view session_id) {
  const auto it = sessions_.find(session_id);
  if (it == sessions_.end()) return nullptr;
  it->second->expires_at = clock_.Monotonic() + it->second->info.lease;
  return it->second.get();
}

DetachedSession SessionManagerImpl::Detach(absl::string_view session_id) {
  DetachedSession ended;
  const auto it = sessions_.find(session_id);
  if (it == sessions_.end()) return ended;
  ended.session = std::move(it->second);
  sessions_.erase(it);
  Session& session = *ended.session;
  ids_by_uuid_.erase(session.client_uuid);
  for (const RegionTable::Taken& region : session.regions.TakeAll()) {
    ++ended.regions;
    region.slot->DropFd();
    if (region.info.owned_bytes == 0) {
      ended.to_retire.push_back(region.slot);
      continue;
    }
    const EarlyFree early_free = transports_.Find(region.info.kind)->early_free();
    const std::optional<QuarantineEnd> until = quarantine_.Hold(
        {.session_id = session.info.session_id, .client_uuid = session.client_uuid}, region,
        early_free, session.process, clock_.Monotonic());
    if (until.has_value()) ended.quarantined.push_back({region.info, *until});
    if (until == QuarantineEnd::kNothing) ended.to_retire.push_back(region.slot);
  }
  return ended;
}

void SessionManagerImpl::End(DetachedSession ended, SessionEnd why, Unmapping unmapping) {
  if (ended.session == nullptr) return;
  const std::string session_id = ended.session->info.session_id;
  const std::vector<DetachedSession::Quarantined> quarantined = std::move(ended.quarantined);
  const int64_t regions = ended.regions;
  absl::AnyInvocable<void()> unmap = [session = std::move(ended.session),
                                      slots = std::move(ended.to_retire)]() mutable {
    for (const auto& slot : slots) slot->Retire();
    slots.clear();
    // With its descriptors, the last of which may free their memory.
    session.reset();
  };
  if (unmapping == Unmapping::kLater && later_) {
    later_(std::move(unmap));
  } else {
    unmap();
  }
  if (observer_ == nullptr) return;
  for (const DetachedSession::Quarantined& region : quarantined) {
    observer_->OnRegionQuarantined(region.info, region.until);
  }
  observer_->OnSessionEnded(session_id, why, regions);
}

uint64_t SessionManagerImpl::NextGeneration() {
  const uint64_t now =
      static_cast<uint64_t>(std::max<int64_t>(absl::ToUnixMicros(clock_.Now()), 0));
  last_generation_ = std::max(last_generation_ + 1, now);
  return last_generation_;
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
  DetachedSession replaced;
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
    info.generation = NextGeneration();
    session->expires_at = clock_.Monotonic() + info.lease;
    opened = info;
    ids_by_uuid_[args.client_uuid] = opened.session_id;
    sessions_[opened.session_id] = std::move(session);
  }
  End(std::move(replaced), SessionEnd::kReplaced, Unmapping::kHere);
  if (observer_ != nullptr) observer_->OnSessionOpened(args, opened);
  return opened;
}

absl::Status SessionManagerImpl::Beat(absl::string_view session_id) {
  absl::MutexLock lock(&mutex_);
  return Touch(session_id) == nullptr ? UnknownSession() : absl::OkStatus();
}

absl::Status SessionManagerImpl::CloseSession(absl::string_view session_id) {
  DetachedSession session;
  {
    absl::MutexLock lock(&mutex_);
    session = Detach(session_id);
  }
  if (session.session == nullptr) return UnknownSession();
  End(std::move(session), SessionEnd::kClosed, Unmapping::kHere);
  return absl::OkStatus();
}

absl::StatusOr<std::string> SessionManagerImpl::RedeemToken(
    const SideSocketToken& token, std::shared_ptr<const UniqueFd> process) {
  std::string session_id;
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [id, session] : sessions_) {
      // Every session is compared, in constant time: how long it takes tells nothing.
      if (ConstantTimeEqual(session->info.token, token) &&
          session->token_state == TokenState::kFresh) {
        session->token_state = TokenState::kRedeemed;
        session->process = process;
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

void SessionManagerImpl::OnHangUp(absl::string_view session_id) {
  DetachedSession session;
  {
    absl::MutexLock lock(&mutex_);
    session = Detach(session_id);
  }
  End(std::move(session), SessionEnd::kHangUp, Unmapping::kLater);
}

int64_t SessionManagerImpl::ReapExpired() {
  std::vector<DetachedSession> expired;
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
  for (DetachedSession& session : expired)
    End(std::move(session), SessionEnd::kLeaseExpired, Unmapping::kLater);
  return count;
}

SessionCounts SessionManagerImpl::Counts() const {
  SessionCounts counts;
  counts.regions = transports_.Counts();
  for (SessionCounts::ByKind& kind : counts.regions) kind.owned_bytes = owned_->BytesOf(kind.kind);
  quarantine_.CountInto(counts.regions);
  absl::MutexLock lock(&mutex_);
  counts.sessions = static_cast<int64_t>(sessions_.size());
  for (const auto& [id, session] : sessions_) session->regions.CountInto(counts.regions);
  return counts;
}

void SessionManagerImpl::Shutdown() {
  std::vector<DetachedSession> sessions;
  {
    absl::MutexLock lock(&mutex_);
    shut_down_ = true;
    while (!sessions_.empty()) sessions.push_back(Detach(std::string(sessions_.begin()->first)));
  }
  for (DetachedSession& session : sessions)
    End(std::move(session), SessionEnd::kShutdown, Unmapping::kHere);
}

std::unique_ptr<SessionManager> SessionManager::New(
    const SessionLimits& limits, std::vector<std::unique_ptr<MemoryTransport>> transports,
    const Clock& clock, SessionObserver* observer, UnmapLater later) {
  return std::make_unique<SessionManagerImpl>(limits, std::move(transports), clock, observer,
                                              std::move(later));
}

}  // namespace keepset::service
