#include "service/rpc/lease_set.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace keepset::service {

absl::Status LeaseSet::Acquire(const std::string& region_id) {
  if (session_id_.empty()) {
    return absl::InvalidArgumentError(
        "session_id is empty, region slices need the session that registered them");
  }
  absl::MutexLock lock(&mutex_);
  for (const auto& [id, lease] : leases_) {
    if (id == region_id) return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(RegionLease lease, sessions_.Lease(session_id_, region_id));
  leases_.emplace_back(region_id, std::move(lease));
  return absl::OkStatus();
}

absl::StatusOr<const MappedRegion*> LeaseSet::Find(absl::string_view region_id) {
  absl::MutexLock lock(&mutex_);
  for (const auto& [id, lease] : leases_) {
    if (id == region_id) return &lease.region();
  }
  return absl::NotFoundError(absl::StrCat("region ", region_id, " is not leased"));
}

void LeaseSet::Release() {
  absl::MutexLock lock(&mutex_);
  leases_.clear();
}

std::string LeaseSet::Transport() const {
  absl::MutexLock lock(&mutex_);
  std::set<std::string> kinds;
  for (const auto& [id, lease] : leases_) kinds.emplace(lease.region().kind());
  return kinds.empty() ? "inline" : absl::StrJoin(kinds, "+");
}

}  // namespace keepset::service
