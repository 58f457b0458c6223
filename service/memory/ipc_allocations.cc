#include "service/memory/ipc_allocations.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

// Closed allocations whose generation is remembered; the oldest key goes first beyond it.
constexpr size_t kMaxRemembered = 4096;

}  // namespace

absl::StatusOr<std::unique_ptr<IpcAllocations::Use>> IpcAllocations::Open(int device,
                                                                          const std::string& handle,
                                                                          uint64_t generation) {
  const std::pair<int, std::string> key(device, handle);
  absl::MutexLock lock(&mutex_);
  const auto found = entries_.find(key);
  if (found != entries_.end()) {
    Entry& entry = found->second;
    if (entry.users > 0 && entry.generation != generation) {
      return absl::FailedPreconditionError(
          absl::StrCat("generation ", generation, ": generation ", entry.generation,
                       " of this handle is still mapped; retire its regions first"));
    }
    if (generation < entry.generation) {
      return absl::FailedPreconditionError(
          absl::StrCat("generation ", generation, ": this handle was mapped as generation ",
                       entry.generation, ", want that or a later one"));
    }
    if (entry.users > 0) {
      ++entry.users;
      return std::make_unique<Use>(shared_from_this(), key, entry.range);
    }
  }
  KEEPSET_ASSIGN_OR_RETURN(const DeviceRange range, driver_->OpenIpc(device, handle));
  entries_[key] = {range, generation, 1};
  return std::make_unique<Use>(shared_from_this(), key, range);
}

void IpcAllocations::Drop(const std::pair<int, std::string>& key) {
  absl::MutexLock lock(&mutex_);
  const auto found = entries_.find(key);
  if (--found->second.users > 0) return;
  // A driver that refuses has lost the mapping already (the device failed): nothing is left to do.
  static_cast<void>(driver_->CloseIpc(key.first, found->second.range.base));
  if (entries_.size() <= kMaxRemembered) return;
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (it->second.users > 0) continue;
    entries_.erase(it);
    return;
  }
}

int64_t IpcAllocations::mapped() const {
  absl::MutexLock lock(&mutex_);
  int64_t count = 0;
  for (const auto& [key, entry] : entries_) count += entry.users > 0 ? 1 : 0;
  return count;
}

uint64_t IpcAllocations::mapped_bytes() const {
  absl::MutexLock lock(&mutex_);
  uint64_t bytes = 0;
  for (const auto& [key, entry] : entries_) bytes += entry.users > 0 ? entry.range.bytes : 0;
  return bytes;
}

}  // namespace keepset::service
