// Ids of ended operations, so that what was still under way to them is dropped silently. Bounded:
// the oldest are forgotten. Not thread-safe.
#ifndef KEEPSET_SERVICE_RPC_TOMBSTONES_H_
#define KEEPSET_SERVICE_RPC_TOMBSTONES_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>

#include "absl/container/flat_hash_set.h"

namespace keepset::service {

class Tombstones {
 public:
  explicit Tombstones(size_t capacity) : capacity_(capacity) {}

  void Add(uint64_t id) {
    if (!ids_.insert(id).second) return;
    order_.push_back(id);
    if (order_.size() <= capacity_) return;
    ids_.erase(order_.front());
    order_.pop_front();
  }
  // The id is in use again.
  void Remove(uint64_t id) {
    if (ids_.erase(id) > 0) order_.erase(std::find(order_.begin(), order_.end(), id));
  }
  bool Contains(uint64_t id) const { return ids_.contains(id); }

 private:
  const size_t capacity_;
  absl::flat_hash_set<uint64_t> ids_;
  std::deque<uint64_t> order_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_TOMBSTONES_H_
