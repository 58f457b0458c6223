// Generations of the device allocations that one client has had mapped.
#ifndef KEEPSET_SERVICE_MEMORY_SEEN_GENERATIONS_H_
#define KEEPSET_SERVICE_MEMORY_SEEN_GENERATIONS_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace keepset::service {

// An exporter counts its allocations, each process from the beginning: generations of one session
// are comparable, those of two are not, even for equal handles. Thread-safe.
class SeenGenerations {
 public:
  // FailedPrecondition: a later generation of this handle was noted.
  absl::Status Check(const std::string& handle, uint64_t generation) const;
  void Note(const std::string& handle, uint64_t generation);

 private:
  mutable absl::Mutex mutex_;
  std::map<std::string, uint64_t> latest_ ABSL_GUARDED_BY(mutex_);  // by handle
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_SEEN_GENERATIONS_H_
