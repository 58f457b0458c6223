#include "service/memory/owned_budget.h"

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace keepset::service {
namespace {

class SharedRegion final : public MappedRegion {
 public:
  SharedRegion(std::unique_ptr<MappedRegion> region, std::unique_ptr<OwnedBudget::Share> share)
      : share_(std::move(share)), region_(std::move(region)) {}

  absl::string_view kind() const override { return region_->kind(); }
  MemorySpace space() const override { return region_->space(); }
  std::byte* data() const override { return region_->data(); }
  int64_t size_bytes() const override { return region_->size_bytes(); }
  RegionAccess access() const override { return region_->access(); }
  absl::Status Verify() const override { return region_->Verify(); }

 private:
  const std::unique_ptr<OwnedBudget::Share> share_;  // ends after the memory
  const std::unique_ptr<MappedRegion> region_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<OwnedBudget::Share>> OwnedBudget::Take(const std::string& kind,
                                                                      uint64_t bytes) {
  if (max_bytes_ == 0) {
    return absl::FailedPreconditionError(
        "this server gives no memory of its own (memory.max_owned_bytes: 0), want that key set, or "
        "memory of the worker's (RegisterRegion)");
  }
  const absl::MutexLock lock(&mutex_);
  if (bytes > max_bytes_ - used_) {
    return absl::ResourceExhaustedError(
        absl::StrCat(bytes, " bytes of the server's memory beside ", used_,
                     " in use or quarantined, the limit memory.max_owned_bytes is ", max_bytes_));
  }
  used_ += bytes;
  by_kind_[kind] += bytes;
  return std::make_unique<Share>(shared_from_this(), kind, bytes);
}

void OwnedBudget::GiveBack(const std::string& kind, uint64_t bytes) {
  const absl::MutexLock lock(&mutex_);
  KEEPSET_CHECK(used_ >= bytes);
  used_ -= bytes;
  by_kind_[kind] -= bytes;
}

uint64_t OwnedBudget::BytesOf(absl::string_view kind) const {
  const absl::MutexLock lock(&mutex_);
  const auto found = by_kind_.find(kind);
  return found == by_kind_.end() ? 0 : found->second;
}

std::unique_ptr<MappedRegion> WithShare(std::unique_ptr<MappedRegion> region,
                                        std::unique_ptr<OwnedBudget::Share> share) {
  return std::make_unique<SharedRegion>(std::move(region), std::move(share));
}

}  // namespace keepset::service
