// The operations of one stream: which are open, and which have ended lately.
//
// Not thread-safe: used under the stream's mutex.
#ifndef KEEPSET_SERVICE_RPC_OPEN_OPERATIONS_H_
#define KEEPSET_SERVICE_RPC_OPEN_OPERATIONS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "service/rpc/stream_operation.h"
#include "service/rpc/tombstones.h"

namespace keepset::service {

class OpenOperations {
 public:
  bool empty() const { return open_.empty(); }
  int64_t size() const { return static_cast<int64_t>(open_.size()); }

  // nullptr when it is not open.
  OperationPtr Find(uint64_t id) const;
  // Whether what still arrives for this id is to be dropped silently.
  bool HasEnded(uint64_t id) const { return ended_.Contains(id); }
  // Those whose end has not arrived.
  std::vector<uint64_t> WithoutEnd() const;

  // The id may be one that has ended.
  void Open(const OperationPtr& operation);
  // An id that never was open, or is no more.
  void MarkEnded(uint64_t id) { ended_.Add(id); }
  // Closes an open operation; its strand stops at its next step. nullptr when it is not open.
  OperationPtr Take(uint64_t id, const absl::Status& why);
  // The same of all of them.
  std::vector<OperationPtr> TakeAll(const absl::Status& why);
  // Closes an operation that is answered; false when it was taken before.
  bool Conclude(StreamOperation& operation);

 private:
  // So many that what was under way to an operation finds it remembered.
  static constexpr size_t kMaxEnded = 4096;

  absl::flat_hash_map<uint64_t, OperationPtr> open_;
  Tombstones ended_ = Tombstones(kMaxEnded);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_OPEN_OPERATIONS_H_
