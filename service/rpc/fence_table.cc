#include "service/rpc/fence_table.h"

#include "absl/strings/str_cat.h"

namespace keepset::service {

absl::Status FenceTable::Check(absl::string_view session_id, absl::string_view request_id,
                               uint64_t generation) {
  if (session_id.empty() || request_id.empty()) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  Session& session = sessions_[session_id];
  const auto it = session.by_request.find(request_id);
  if (it != session.by_request.end()) {
    uint64_t& seen = it->second->second;
    if (generation < seen) {
      return absl::AbortedError(
          absl::StrCat("request_generation=", generation, " is stale, want at least ", seen));
    }
    seen = generation;
    session.recency.splice(session.recency.begin(), session.recency, it->second);
    return absl::OkStatus();
  }
  session.recency.emplace_front(std::string(request_id), generation);
  session.by_request[request_id] = session.recency.begin();
  if (session.recency.size() > capacity_) {
    session.by_request.erase(session.recency.back().first);
    session.recency.pop_back();
  }
  return absl::OkStatus();
}

void FenceTable::Forget(absl::string_view session_id) {
  absl::MutexLock lock(&mutex_);
  sessions_.erase(session_id);
}

}  // namespace keepset::service
