// The limit on memory of the server's own that workers may map, quarantined memory included: a
// client that dies again and again cannot take the whole host or device.
#ifndef KEEPSET_SERVICE_MEMORY_OWNED_BUDGET_H_
#define KEEPSET_SERVICE_MEMORY_OWNED_BUDGET_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

// Thread-safe; shares keep it alive.
class OwnedBudget : public std::enable_shared_from_this<OwnedBudget> {
 public:
  explicit OwnedBudget(uint64_t max_bytes) : max_bytes_(max_bytes) {}

  // Gives its bytes back at destruction.
  class Share {
   public:
    Share(std::shared_ptr<OwnedBudget> owner, std::string kind, uint64_t bytes)
        : owner_(std::move(owner)), kind_(std::move(kind)), bytes_(bytes) {}
    ~Share() { owner_->GiveBack(kind_, bytes_); }
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;

   private:
    const std::shared_ptr<OwnedBudget> owner_;
    const std::string kind_;
    const uint64_t bytes_;
  };

  // FailedPrecondition: the limit is 0. ResourceExhausted: it is reached.
  absl::StatusOr<std::unique_ptr<Share>> Take(const std::string& kind, uint64_t bytes);
  uint64_t BytesOf(absl::string_view kind) const;

 private:
  void GiveBack(const std::string& kind, uint64_t bytes);

  const uint64_t max_bytes_;
  mutable absl::Mutex mutex_;
  uint64_t used_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::string, uint64_t, std::less<>> by_kind_ ABSL_GUARDED_BY(mutex_);
};

// `region`, whose end gives `share` back as soon as the memory is free.
std::unique_ptr<MappedRegion> WithShare(std::unique_ptr<MappedRegion> region,
                                        std::unique_ptr<OwnedBudget::Share> share);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_OWNED_BUDGET_H_
