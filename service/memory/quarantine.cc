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

std::optional<QuarantineEnd> Quarantine::Hold(Origin origin, RegionTable::Taken region,
                                              EarlyFree early_free,
                                              std::shared_ptr<const UniqueFd> process,
                                              absl::Duration now) {
  Held held;
  held.origin = std::move(origin);
  held.process = std::move(process);
  held.end = now + time_;
  if (!region.slot->retired()) {
    held.until = early_free == EarlyFree::kHarmless ? QuarantineEnd::kNothing
                 : held.process != nullptr          ? QuarantineEnd::kProcess
                                                    : QuarantineEnd::kTime;
  }
  held.region = std::move(region);
  const std::optional<QuarantineEnd> until = held.until;
  const absl::MutexLock lock(&mutex_);
  held_.push_back(std::move(held));
  return until;
}

std::shared_ptr<RegionSlot> Quarantine::Find(absl::string_view session_id,
                                             absl::string_view region_id) const {
  const absl::MutexLock lock(&mutex_);
  for (const Held& held : held_) {
    if (held.origin.session_id == session_id && held.region.info.region_id == region_id) {
      return held.region.slot;
    }
  }
  return nullptr;
}

bool Quarantine::IsSafe(Held& held, absl::Duration now) const {
  if (!held.until.has_value()) return true;
  switch (*held.until) {
    case QuarantineEnd::kNothing:
      return true;
    case QuarantineEnd::kProcess:
      if (!HasEnded(held.process->get())) return false;
      // When the driver is done with what a killed process left on the device is not documented.
      held.until = QuarantineEnd::kTime;
      held.end = now + time_;
      return held.end <= now;
    case QuarantineEnd::kTime:
      return held.end <= now;
  }
  return false;
}

void Quarantine::Sweep(absl::Duration now) {
  std::vector<std::shared_ptr<RegionSlot>> safe;
  {
    const absl::MutexLock lock(&mutex_);
    for (Held& held : held_) {
      if (IsSafe(held, now)) safe.push_back(held.region.slot);
    }
  }
  // Outside the lock: a device may take its time.
  for (const auto& slot : safe) slot->Retire();
  const absl::MutexLock lock(&mutex_);
  held_.erase(
      std::remove_if(held_.begin(), held_.end(), [](const Held& held) { return held.is_gone; }),
      held_.end());
  for (Held& held : held_) held.is_gone = held.region.slot->unmapped();
}

uint64_t Quarantine::BytesOf(absl::string_view client_uuid) const {
  const absl::MutexLock lock(&mutex_);
  uint64_t bytes = 0;
  for (const Held& held : held_) {
    if (held.origin.client_uuid == client_uuid && !held.region.slot->unmapped()) {
      bytes += held.region.info.owned_bytes;
    }
  }
  return bytes;
}

void Quarantine::CountInto(std::vector<SessionCounts::ByKind>& counts) const {
  const absl::MutexLock lock(&mutex_);
  for (const Held& held : held_) {
    if (!held.until.has_value() || held.region.slot->unmapped()) continue;
    for (SessionCounts::ByKind& by_kind : counts) {
      if (by_kind.kind != held.region.info.kind) continue;
      ++by_kind.quarantined_regions;
      by_kind.quarantined_bytes += held.region.info.owned_bytes;
    }
  }
}

}  // namespace keepset::service
