// The tables sessions pinned when they were opened. Thread-safe.
#ifndef KEEPSET_SERVICE_RPC_SESSION_PINS_H_
#define KEEPSET_SERVICE_RPC_SESSION_PINS_H_

#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "keepset/v1/common.pb.h"

namespace keepset::service {

class SessionPins {
 public:
  void Set(const std::string& session_id, const v1::TablePin& pin) {
    absl::MutexLock lock(&mutex_);
    pins_[session_id] = pin;
  }
  void Forget(absl::string_view session_id) {
    absl::MutexLock lock(&mutex_);
    pins_.erase(session_id);
  }
  std::optional<v1::TablePin> Of(absl::string_view session_id) const {
    absl::MutexLock lock(&mutex_);
    const auto it = pins_.find(session_id);
    if (it == pins_.end()) return std::nullopt;
    return it->second;
  }

 private:
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, v1::TablePin> pins_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SESSION_PINS_H_
