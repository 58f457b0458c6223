// What grpc.health.v1 says: "" (live), the compression service (ready), one name per model
// architecture with an active table. Thread-safe; remembers what was set before the server runs.
#ifndef KEEPSET_SERVICE_HEALTH_BOARD_H_
#define KEEPSET_SERVICE_HEALTH_BOARD_H_

#include <grpcpp/health_check_service_interface.h>

#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace keepset::service {

class HealthBoard {
 public:
  // From now on `health` (nullptr: nobody) says what the board knows; it must outlive Detach.
  void Attach(grpc::HealthCheckServiceInterface* health);
  void Detach(grpc::HealthCheckServiceInterface* health);
  // The architectures with an active table now; those of before that are missing stop serving.
  void SetModels(std::set<std::string> models);
  // Everything but "" stops serving.
  void StopServing();

 private:
  void Apply() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  absl::Mutex mutex_;
  std::vector<grpc::HealthCheckServiceInterface*> attached_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> known_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> models_ ABSL_GUARDED_BY(mutex_);
  bool ready_ ABSL_GUARDED_BY(mutex_) = true;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_HEALTH_BOARD_H_
