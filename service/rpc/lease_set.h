// The region leases of one operation, taken while its messages are read and dropped together before
// its answer is sent. Thread-safe: the reader of a stream adds leases while a worker uses others.
#ifndef KEEPSET_SERVICE_RPC_LEASE_SET_H_
#define KEEPSET_SERVICE_RPC_LEASE_SET_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "service/memory/session_manager.h"
#include "service/rpc/request_codec.h"

namespace keepset::service {

class LeaseSet final : public RegionSource {
 public:
  // `sessions` must outlive the set.
  LeaseSet(SessionManager& sessions, std::string session_id)
      : sessions_(sessions), session_id_(std::move(session_id)) {}

  // Leases the region once, however often it is named. InvalidArgument without a session.
  absl::Status Acquire(const std::string& region_id);
  // A region that was acquired; NotFound otherwise.
  absl::StatusOr<const MappedRegion*> Find(absl::string_view region_id) override;
  // Views into the regions are dead after this.
  void Release();

  // Kinds of the leased regions, joined with '+'; "inline" when there are none.
  std::string Transport() const;

 private:
  SessionManager& sessions_;
  const std::string session_id_;
  mutable absl::Mutex mutex_;
  std::vector<std::pair<std::string, RegionLease>> leases_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_LEASE_SET_H_
