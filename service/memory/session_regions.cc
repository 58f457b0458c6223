// The regions of sessions: memory of workers and of the server's own.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "base/cuda_abi.h"
#include "base/status_macros.h"
#include "service/memory/random_id.h"
#include "service/memory/session_manager_impl.h"

namespace keepset::service {
namespace {

constexpr size_t kMaxPendingFds = 64;
constexpr uint64_t kMaxOwnedLength = uint64_t{1} << 62;
constexpr size_t kMostEchoed = 64;

// A token that is not in use.
template <typename InUse>
absl::StatusOr<uint64_t> NewFdToken(InUse is_in_use) {
  uint64_t token = 0;
  while (token == 0 || is_in_use(token)) {
    KEEPSET_RETURN_IF_ERROR(
        FillRandom(absl::MakeSpan(reinterpret_cast<uint8_t*>(&token), sizeof(token))));
  }
  return token;
}

absl::Status UnknownRegion() {
  return absl::NotFoundError("region_id: no such region in this session");
}

}  // namespace

absl::StatusOr<uint64_t> SessionManagerImpl::DepositFd(absl::string_view session_id, UniqueFd fd) {
  absl::MutexLock lock(&mutex_);
  Session* session = Touch(session_id);
  if (session == nullptr) return UnknownSession();
  if (session->pending_fds.size() >= kMaxPendingFds) {
    return absl::ResourceExhaustedError(absl::StrCat(
        kMaxPendingFds, " descriptors of the session wait for RegisterRegion, register them"));
  }
  KEEPSET_ASSIGN_OR_RETURN(const uint64_t token, NewFdToken([&](uint64_t candidate) {
                             return session->pending_fds.contains(candidate);
                           }));
  session->pending_fds.emplace(token, std::move(fd));
  return token;
}

absl::StatusOr<UniqueFd> SessionManagerImpl::FetchFd(absl::string_view session_id,
                                                     uint64_t fd_token) {
  absl::MutexLock lock(&mutex_);
  Session* session = Touch(session_id);
  if (session == nullptr) return UnknownSession();
  UniqueFd fd = session->regions.TakeFd(fd_token);
  if (!fd.valid()) {
    return absl::NotFoundError(
        "fd_token: AllocateRegion answered no such token in this session, it was used, or the "
        "region was retired");
  }
  return fd;
}

absl::StatusOr<RegionInfo> SessionManagerImpl::RegisterRegion(absl::string_view session_id,
                                                              absl::string_view name,
                                                              uint64_t fd_token,
                                                              RegionDescriptor descriptor) {
  // Only known kinds reach the observer: its labels are bounded.
  const MemoryTransport* transport = transports_.Find(descriptor.kind);
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
  MemoryTransport* const transport = transports_.Find(descriptor.kind);
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
      return transports_.UnknownKind(info.kind);
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

absl::StatusOr<AllocatedRegion> SessionManagerImpl::AllocateRegion(absl::string_view session_id,
                                                                   absl::string_view name,
                                                                   const std::string& kind,
                                                                   uint64_t length,
                                                                   const std::string& device_uuid) {
  RegionInfo info;
  KEEPSET_ASSIGN_OR_RETURN(info.region_id, RandomId());
  info.name = std::string(name);
  info.kind = kind;
  info.length = length;
  info.access = RegionAccess::kReadWrite;
  const MemoryTransport* transport = transports_.Find(kind);
  absl::StatusOr<AllocatedRegion> region = Allocate(session_id, std::move(info), device_uuid);
  if (observer_ != nullptr && region.ok()) {
    observer_->OnRegionRegistered(session_id, region->info);
  } else if (observer_ != nullptr) {
    observer_->OnRegionRefused(transport == nullptr ? "unknown" : transport->kind(),
                               region.status());
  }
  return region;
}

absl::StatusOr<AllocatedRegion> SessionManagerImpl::Allocate(absl::string_view session_id,
                                                             RegionInfo info,
                                                             const std::string& device_uuid) {
  MemoryTransport* const transport = transports_.Find(info.kind);
  std::unique_ptr<OwnedBudget::Share> share;
  {
    absl::MutexLock lock(&mutex_);
    Session* session = Touch(session_id);
    if (session == nullptr) return UnknownSession();
    if (transport == nullptr) return transports_.UnknownKind(info.kind);
    if (info.length == 0 || info.length > kMaxOwnedLength) {
      return absl::InvalidArgumentError(
          absl::StrCat("length=", info.length, ", want 1..", kMaxOwnedLength));
    }
    // A context on a device that no operation uses would cost it memory for nothing.
    if (SpaceOf(info.kind) == MemorySpace::kDevice && !device_uuid.empty() &&
        !limits_.owned_device_uuid.empty() &&
        !cuda_abi::IsSameDevice(device_uuid, limits_.owned_device_uuid)) {
      return absl::FailedPreconditionError(
          absl::StrCat("device_uuid=\"", absl::CHexEscape(device_uuid.substr(0, kMostEchoed)),
                       "\": operations of this server use device \"", limits_.owned_device_uuid,
                       "\", want that one"));
    }
    if (session->regions.FdTokens().size() >= kMaxPendingFds) {
      return absl::ResourceExhaustedError(absl::StrCat(
          kMaxPendingFds, " descriptors of the session wait on its side socket, fetch them"));
    }
    info.owned_bytes = transport->AllocationBytes(info.length);
    info.generation = NextGeneration();
    // What a client left in quarantine by earlier sessions is its own as well.
    const uint64_t owned =
        session->regions.OwnedBytes() + quarantine_.BytesOf(session->client_uuid);
    if (limits_.max_owned_bytes > 0 &&
        (owned > limits_.max_owned_bytes_per_session ||
         info.owned_bytes > limits_.max_owned_bytes_per_session - owned)) {
      return absl::ResourceExhaustedError(
          absl::StrCat(info.owned_bytes, " bytes of the server's memory beside ", owned,
                       " of this client, quarantined memory included, the limit "
                       "memory.max_owned_bytes_per_session is ",
                       limits_.max_owned_bytes_per_session));
    }
    KEEPSET_ASSIGN_OR_RETURN(share, owned_->Take(info.kind, info.owned_bytes));
    KEEPSET_RETURN_IF_ERROR(session->regions.Reserve(info));
  }
  // Takes as long as the device does; nobody waits for it.
  absl::StatusOr<OwnedMemory> memory = transport->Create(info.length, device_uuid);
  absl::MutexLock lock(&mutex_);
  Session* session = Touch(session_id);
  // Nobody has mapped it yet.
  if (session == nullptr) return UnknownSession();
  if (!memory.ok()) {
    session->regions.Abort(info.region_id);
    return memory.status();
  }
  AllocatedRegion allocated;
  allocated.info = std::move(info);
  allocated.offset = memory->offset;
  allocated.ipc_handle = std::move(memory->ipc_handle);
  UnfetchedFd unfetched;
  if (memory->fd.valid()) {
    const std::vector<uint64_t> tokens = session->regions.FdTokens();
    const absl::StatusOr<uint64_t> token = NewFdToken([&](uint64_t candidate) {
      return std::find(tokens.begin(), tokens.end(), candidate) != tokens.end();
    });
    if (!token.ok()) {
      session->regions.Abort(allocated.info.region_id);
      return token.status();
    }
    allocated.fd_token = *token;
    unfetched = {*token, std::move(memory->fd)};
  }
  session->regions.Commit(
      allocated.info.region_id,
      std::make_shared<RegionSlot>(WithShare(std::move(memory->region), std::move(share)),
                                   std::move(unfetched)));
  return allocated;
}

absl::Status SessionManagerImpl::RetireRegion(absl::string_view session_id,
                                              absl::string_view region_id, absl::Duration timeout) {
  std::shared_ptr<RegionSlot> slot;
  {
    absl::MutexLock lock(&mutex_);
    Session* session = Touch(session_id);
    slot = session == nullptr ? quarantine_.Find(session_id, region_id)
                              : session->regions.Find(region_id);
    if (session == nullptr && slot == nullptr) return UnknownSession();
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

}  // namespace keepset::service
