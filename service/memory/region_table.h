// The regions of one session and the counted leases on them.
//
// A RegionSlot owns one mapping. It lives on after its session while leases are out: the last lease
// of a retired slot unmaps, on the thread that drops it. RegionSlot is thread-safe; RegionTable is
// guarded by its owner.
#ifndef KEEPSET_SERVICE_MEMORY_REGION_TABLE_H_
#define KEEPSET_SERVICE_MEMORY_REGION_TABLE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/memory/memory_transport.h"
#include "service/memory/session_manager.h"

namespace keepset::service {

// The worker's own descriptor of memory of ours, until it takes it; it keeps the memory, too.
struct UnfetchedFd {
  uint64_t token = 0;
  UniqueFd fd;
};

class RegionSlot : public std::enable_shared_from_this<RegionSlot> {
 public:
  explicit RegionSlot(std::unique_ptr<MappedRegion> mapping, UnfetchedFd unfetched = {})
      : mapping_(std::move(mapping)), unfetched_(std::move(unfetched)) {}

  // Invalid when the slot is retired.
  RegionLease Acquire();
  // Invalid when the token is another one's, it was taken, or it was dropped.
  UniqueFd TakeFd(uint64_t token);
  // Nobody will take it.
  void DropFd();
  // The token of a descriptor that was not taken; 0: none.
  uint64_t fd_token() const;
  // No new leases, no descriptor; unmaps now, or with the last lease. Idempotent.
  void Retire();
  // Whether the memory is unmapped after waiting up to `timeout`. Only a retired slot gets there.
  bool AwaitUnmapped(absl::Duration timeout);

  bool retired() const;
  bool unmapped() const;
  int64_t leases() const;

 private:
  void Drop();
  // Unmaps outside the lock when retired and unused: tearing down a large mapping takes long.
  void UnmapIfUnused();

  mutable absl::Mutex mutex_;
  std::unique_ptr<MappedRegion> mapping_ ABSL_GUARDED_BY(mutex_);
  UnfetchedFd unfetched_ ABSL_GUARDED_BY(mutex_);
  int64_t leases_ ABSL_GUARDED_BY(mutex_) = 0;
  bool retired_ ABSL_GUARDED_BY(mutex_) = false;
  bool unmapped_ ABSL_GUARDED_BY(mutex_) = false;
};

class RegionTable {
 public:
  RegionTable(int64_t max_regions, uint64_t max_bytes)
      : max_regions_(max_regions), max_bytes_(max_bytes) {}

  // Takes name and quota for a region that is being mapped. AlreadyExists: name.
  // ResourceExhausted: quota. InvalidArgument: not a name.
  absl::Status Reserve(const RegionInfo& info);
  // Ends a reservation with a mapping, or gives it back.
  void Commit(absl::string_view region_id, std::shared_ptr<RegionSlot> slot);
  void Abort(absl::string_view region_id);

  // nullptr: no region of this id, or still being mapped. A region that was retired and is unmapped
  // is found until Forget, so that a retried retire learns of its success.
  std::shared_ptr<RegionSlot> Find(absl::string_view region_id) const;
  void Forget(absl::string_view region_id);

  // The descriptor of that token; invalid: none.
  UniqueFd TakeFd(uint64_t token) const;
  // Tokens of descriptors that were not taken.
  std::vector<uint64_t> FdTokens() const;

  // Mapped regions, by name.
  std::vector<RegionInfo> List() const;
  // Adds the mapped regions to `counts` under their kinds; kinds not listed there are left out.
  void CountInto(std::vector<SessionCounts::ByKind>& counts) const;
  // Memory of the server's own among the regions, those being made included.
  uint64_t OwnedBytes() const;

  struct Taken {
    RegionInfo info;
    std::shared_ptr<RegionSlot> slot;
  };
  // Every mapped region; the table is empty afterwards.
  std::vector<Taken> TakeAll();

 private:
  struct Entry {
    RegionInfo info;
    std::shared_ptr<RegionSlot> slot;  // nullptr while being mapped
  };
  static bool IsGone(const Entry& entry) { return entry.slot != nullptr && entry.slot->unmapped(); }

  const int64_t max_regions_;
  const uint64_t max_bytes_;
  absl::flat_hash_map<std::string, Entry> entries_;  // by region id
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_REGION_TABLE_H_
