// Highest request generation seen per session and request id: a late copy of an older request must
// not be answered as if it were the current one. Bounded; thread-safe.
#ifndef KEEPSET_SERVICE_RPC_FENCE_TABLE_H_
#define KEEPSET_SERVICE_RPC_FENCE_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"

namespace keepset::service {

class FenceTable {
 public:
  // Per session the `capacity` most recently used request ids are remembered.
  explicit FenceTable(size_t capacity) : capacity_(capacity) {}

  // Aborted when a higher generation was seen. An empty session or request id has no fence.
  absl::Status Check(absl::string_view session_id, absl::string_view request_id,
                     uint64_t generation);
  // The session ended.
  void Forget(absl::string_view session_id);

 private:
  using Recency = std::list<std::pair<std::string, uint64_t>>;  // request id, generation
  struct Session {
    Recency recency;  // most recent first
    absl::flat_hash_map<std::string, Recency::iterator> by_request;
  };

  const size_t capacity_;
  absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Session> sessions_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_FENCE_TABLE_H_
