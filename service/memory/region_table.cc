#include "service/memory/region_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace keepset::service {
namespace {

constexpr size_t kMaxNameBytes = 128;

bool IsValidName(absl::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return absl::ascii_isgraph(static_cast<unsigned char>(c)); });
}

}  // namespace

RegionLease RegionSlot::Acquire() {
  const MappedRegion* mapping = nullptr;
  {
    absl::MutexLock lock(&mutex_);
    if (retired_) return RegionLease();
    ++leases_;
    mapping = mapping_.get();
  }
  return RegionLease(std::shared_ptr<const MappedRegion>(
      mapping, [slot = shared_from_this()](const MappedRegion*) { slot->Drop(); }));
}

void RegionSlot::Drop() {
  {
    absl::MutexLock lock(&mutex_);
    --leases_;
    KEEPSET_CHECK(leases_ >= 0);
  }
  UnmapIfUnused();
}

UniqueFd RegionSlot::TakeFd(uint64_t token) {
  absl::MutexLock lock(&mutex_);
  if (token != unfetched_.token) return UniqueFd();
  return std::move(unfetched_.fd);
}

void RegionSlot::DropFd() {
  absl::MutexLock lock(&mutex_);
  unfetched_.fd.Reset();
}

uint64_t RegionSlot::fd_token() const {
  absl::MutexLock lock(&mutex_);
  return unfetched_.fd.valid() ? unfetched_.token : 0;
}

void RegionSlot::Retire() {
  {
    absl::MutexLock lock(&mutex_);
    retired_ = true;
    unfetched_.fd.Reset();
  }
  UnmapIfUnused();
}

void RegionSlot::UnmapIfUnused() {
  std::unique_ptr<MappedRegion> mapping;
  {
    absl::MutexLock lock(&mutex_);
    if (!retired_ || leases_ > 0 || mapping_ == nullptr) return;
    mapping = std::move(mapping_);
  }
  mapping.reset();
  absl::MutexLock lock(&mutex_);
  unmapped_ = true;
}

bool RegionSlot::AwaitUnmapped(absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithTimeout(absl::Condition(&unmapped_), timeout);
}

bool RegionSlot::retired() const {
  absl::MutexLock lock(&mutex_);
  return retired_;
}

bool RegionSlot::unmapped() const {
  absl::MutexLock lock(&mutex_);
  return unmapped_;
}

int64_t RegionSlot::leases() const {
  absl::MutexLock lock(&mutex_);
  return leases_;
}

absl::Status RegionTable::Reserve(const RegionInfo& info) {
  if (!IsValidName(info.name)) {
    return absl::InvalidArgumentError(absl::StrCat("name: ", info.name.size(), " bytes, want 1..",
                                                   kMaxNameBytes,
                                                   " printable ASCII characters, no spaces"));
  }
  int64_t regions = 0;
  uint64_t bytes = 0;
  for (const auto& [id, entry] : entries_) {
    if (IsGone(entry)) continue;
    if (entry.info.name == info.name) {
      return absl::AlreadyExistsError(
          absl::StrCat("name=\"", info.name, "\" is a region of this session, retire it first"));
    }
    ++regions;
    bytes += entry.info.length;  // Their sum passed the check below, so it cannot wrap.
  }
  if (regions >= max_regions_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the session has ", regions, " regions, the limit is ", max_regions_));
  }
  if (bytes > max_bytes_ || info.length > max_bytes_ - bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("length=", info.length, " beside ", bytes,
                                                     " bytes registered, the session's limit is ",
                                                     max_bytes_));
  }
  // Regions that are gone wait here for a retried retire; they never outnumber the living quota.
  if (static_cast<int64_t>(entries_.size()) >= max_regions_) {
    absl::erase_if(entries_, [](const auto& item) { return IsGone(item.second); });
  }
  entries_.emplace(info.region_id, Entry{info, nullptr});
  return absl::OkStatus();
}

void RegionTable::Commit(absl::string_view region_id, std::shared_ptr<RegionSlot> slot) {
  const auto it = entries_.find(region_id);
  KEEPSET_CHECK(it != entries_.end());
  it->second.slot = std::move(slot);
}

void RegionTable::Abort(absl::string_view region_id) { Forget(region_id); }

std::shared_ptr<RegionSlot> RegionTable::Find(absl::string_view region_id) const {
  const auto it = entries_.find(region_id);
  return it == entries_.end() ? nullptr : it->second.slot;
}

void RegionTable::Forget(absl::string_view region_id) {
  const auto it = entries_.find(region_id);
  if (it != entries_.end()) entries_.erase(it);
}

UniqueFd RegionTable::TakeFd(uint64_t token) const {
  for (const auto& [id, entry] : entries_) {
    if (entry.slot == nullptr) continue;
    UniqueFd fd = entry.slot->TakeFd(token);
    if (fd.valid()) return fd;
  }
  return UniqueFd();
}

std::vector<uint64_t> RegionTable::FdTokens() const {
  std::vector<uint64_t> tokens;
  for (const auto& [id, entry] : entries_) {
    const uint64_t token = entry.slot == nullptr ? 0 : entry.slot->fd_token();
    if (token != 0) tokens.push_back(token);
  }
  return tokens;
}

std::vector<RegionInfo> RegionTable::List() const {
  std::vector<RegionInfo> regions;
  for (const auto& [id, entry] : entries_) {
    if (entry.slot == nullptr || IsGone(entry)) continue;
    RegionInfo info = entry.info;
    info.retiring = entry.slot->retired();
    info.leases = entry.slot->leases();
    regions.push_back(std::move(info));
  }
  std::sort(regions.begin(), regions.end(),
            [](const RegionInfo& a, const RegionInfo& b) { return a.name < b.name; });
  return regions;
}

void RegionTable::CountInto(std::vector<SessionCounts::ByKind>& counts) const {
  for (const auto& [id, entry] : entries_) {
    if (entry.slot == nullptr || IsGone(entry)) continue;
    for (SessionCounts::ByKind& by_kind : counts) {
      if (by_kind.kind != entry.info.kind) continue;
      ++by_kind.regions;
      by_kind.bytes += entry.info.length;
    }
  }
}

uint64_t RegionTable::OwnedBytes() const {
  uint64_t bytes = 0;
  for (const auto& [id, entry] : entries_) {
    if (!IsGone(entry)) bytes += entry.info.owned_bytes;
  }
  return bytes;
}

std::vector<RegionTable::Taken> RegionTable::TakeAll() {
  std::vector<Taken> taken;
  for (auto& [id, entry] : entries_) {
    if (entry.slot == nullptr || IsGone(entry)) continue;
    taken.push_back({std::move(entry.info), std::move(entry.slot)});
  }
  entries_.clear();
  return taken;
}

}  // namespace keepset::service
