#include "service/memory/quarantine.h"

#include <poll.h>

#include <algorithm>
#include <utility>

namespace keepset::service {
namespace {

// A pidfd is readable once the whole process has ended.
bool HasEnded(int pidfd) {
  pollfd polled = {pidfd, POLLIN, 0};
  return ::poll(&polled, 1, 0) > 0 && (polled.revents & POLLIN) != 0;
}

}  // namespace

QuarantineEnd Quarantine::Hold(const std::string& session_id, RegionTable::Taken region,
                               EarlyFree early_free, std::shared_ptr<const UniqueFd> process,
                               absl::Duration now) {
  Held held;
  held.session_id = session_id;
  held.region = std::move(region);
  held.process = std::move(process);
  held.end = now + time_;
  held.until = early_free == EarlyFree::kHarmless ? QuarantineEnd::kNothing
               : held.process != nullptr          ? QuarantineEnd::kProcess
                                                  : QuarantineEnd::kTime;
  const QuarantineEnd until = held.until;
  const std::shared_ptr<RegionSlot> slot = held.region.slot;
  {
    const absl::MutexLock lock(&mutex_);
    held_.push_back(std::move(held));
  }
  if (until == QuarantineEnd::kNothing) slot->Retire();
  return until;
}

std::shared_ptr<RegionSlot> Quarantine::Find(absl::string_view session_id,
                                             absl::string_view region_id) const {
  const absl::MutexLock lock(&mutex_);
  for (const Held& held : held_) {
    if (held.session_id == session_id && held.region.info.region_id == region_id) {
      return held.region.slot;
    }
  }
  return nullptr;
}

bool Quarantine::IsSafe(const Held& held, absl::Duration now) {
  switch (held.until) {
    case QuarantineEnd::kNothing:
      return true;
    case QuarantineEnd::kProcess:
      return HasEnded(held.process->get());
    case QuarantineEnd::kTime:
      return held.end <= now;
  }
  return false;
}

void Quarantine::Sweep(absl::Duration now) {
  std::vector<std::shared_ptr<RegionSlot>> safe;
  {
    const absl::MutexLock lock(&mutex_);
    for (const Held& held : held_) {
      if (IsSafe(held, now)) safe.push_back(held.region.slot);
    }
  }
  // Outside the lock: a device may take its time.
  for (const auto& slot : safe) slot->Retire();
  const absl::MutexLock lock(&mutex_);
  held_.erase(std::remove_if(held_.begin(), held_.end(),
                             [](const Held& held) { return held.region.slot->unmapped(); }),
              held_.end());
}

void Quarantine::CountInto(std::vector<SessionCounts::ByKind>& counts) const {
  const absl::MutexLock lock(&mutex_);
  for (const Held& held : held_) {
    if (held.region.slot->unmapped()) continue;
    for (SessionCounts::ByKind& by_kind : counts) {
      if (by_kind.kind != held.region.info.kind) continue;
      ++by_kind.quarantined_regions;
      by_kind.quarantined_bytes += held.region.info.owned_bytes;
    }
  }
}

}  // namespace keepset::service
