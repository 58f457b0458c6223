// One value for each open session that has one. Thread-safe.
#ifndef KEEPSET_SERVICE_RPC_PER_SESSION_H_
#define KEEPSET_SERVICE_RPC_PER_SESSION_H_

#include <optional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "keepset/v1/common.pb.h"

namespace keepset::service {

template <typename Value>
class PerSession {
 public:
  void Set(const std::string& session_id, Value value) {
    absl::MutexLock lock(&mutex_);
    values_[session_id] = std::move(value);
  }
  void Forget(absl::string_view session_id) {
    absl::MutexLock lock(&mutex_);
    values_.erase(session_id);
  }
  std::optional<Value> Of(absl::string_view session_id) const {
    absl::MutexLock lock(&mutex_);
    const auto it = values_.find(session_id);
    if (it == values_.end()) return std::nullopt;
    return it->second;
  }

 private:
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Value> values_ ABSL_GUARDED_BY(mutex_);
};

// The tables sessions pinned when they were opened.
using SessionPins = PerSession<v1::TablePin>;
// The tenants sessions were opened for.
using SessionTenants = PerSession<std::string>;

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_PER_SESSION_H_
