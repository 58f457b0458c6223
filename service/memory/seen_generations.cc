#include "service/memory/seen_generations.h"

#include <algorithm>
#include <cstddef>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace keepset::service {
namespace {

// The first handle in order goes beyond it.
constexpr size_t kMaxRemembered = 4096;

}  // namespace

absl::Status SeenGenerations::Check(const std::string& handle, uint64_t generation) const {
  const absl::MutexLock lock(&mutex_);
  const auto found = latest_.find(handle);
  if (found == latest_.end() || generation >= found->second) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("generation ", generation,
                                                    ": this handle was mapped as generation ",
                                                    found->second, ", want that or a later one"));
}

void SeenGenerations::Note(const std::string& handle, uint64_t generation) {
  const absl::MutexLock lock(&mutex_);
  uint64_t& latest = latest_[handle];
  latest = std::max(latest, generation);
  if (latest_.size() <= kMaxRemembered) return;
  latest_.erase(latest_.begin()->first == handle ? std::next(latest_.begin()) : latest_.begin());
}

}  // namespace keepset::service
