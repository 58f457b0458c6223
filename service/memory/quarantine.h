// Memory of the server's own whose session ended before the worker retired it: nobody gets it, and
// it is not freed, before a safe point.
//
// Freeing exported memory that an importer has open is undefined, and a worker that lost its
// connection may be alive, its GPU work under way. Safe are, in this order:
//   - the worker's retire (by session and region id, also after the session);
//   - memory whose users the kernel counts (EarlyFree::kHarmless): at once;
//   - the end of the process that held the session's side socket, seen on its pidfd: and then the
//     fixed time: it has no mapping any more, but work that it left on the device may still run. A
//     process that it handed the memory on to is not seen;
//   - where there is no pidfd (no side socket; in kernels before 6.5 a pid namespace that hides the
//     process): a fixed time after the session's end. This one is a guess: a worker that stood
//     still for longer may still have the memory mapped.
// Memory that operations use waits for them in every case. What is freed goes back to the kernel or
// the driver, never to another region.
#ifndef KEEPSET_SERVICE_MEMORY_QUARANTINE_H_
#define KEEPSET_SERVICE_MEMORY_QUARANTINE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/memory/memory_transport.h"
#include "service/memory/region_table.h"
#include "service/memory/session_manager.h"

namespace keepset::service {

// Thread-safe. Its end frees everything.
class Quarantine {
 public:
  explicit Quarantine(absl::Duration time) : time_(time) {}

  struct Origin {
    std::string session_id;
    std::string client_uuid;
  };
  // process: pidfd of the worker, null where it cannot be watched. Unmaps nothing: kNothing is for
  // the caller to retire. nullopt: the worker has given its word already; the region is held for a
  // retire that still waits for operations.
  std::optional<QuarantineEnd> Hold(Origin origin, RegionTable::Taken region, EarlyFree early_free,
                                    std::shared_ptr<const UniqueFd> process, absl::Duration now);
  // nullptr: holds no such region.
  std::shared_ptr<RegionSlot> Find(absl::string_view session_id, absl::string_view region_id) const;
  // Frees what may be freed; may wait for the memory's device.
  void Sweep(absl::Duration now);
  // What is held of that client.
  uint64_t BytesOf(absl::string_view client_uuid) const;
  // Adds what is held under its kind, without what the worker has given back.
  void CountInto(std::vector<SessionCounts::ByKind>& counts) const;

 private:
  struct Held {
    Origin origin;
    RegionTable::Taken region;
    std::optional<QuarantineEnd> until;
    bool is_gone = false;  // since the last sweep: a retire that waits in turns still finds it
    std::shared_ptr<const UniqueFd> process;  // kProcess
    absl::Duration end;                       // kTime
  };
  // A process whose end is seen here starts the time.
  bool IsSafe(Held& held, absl::Duration now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const absl::Duration time_;
  mutable absl::Mutex mutex_;
  std::vector<Held> held_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_QUARANTINE_H_
