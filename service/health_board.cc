#include "service/health_board.h"

#include <utility>

namespace keepset::service {
namespace {

constexpr char kCompressionService[] = "keepset.v1.CompressionService";

}  // namespace

void HealthBoard::Attach(grpc::HealthCheckServiceInterface* health) {
  absl::MutexLock lock(&mutex_);
  if (health == nullptr) return;
  attached_.push_back(health);
  Apply();
}

void HealthBoard::Detach(grpc::HealthCheckServiceInterface* health) {
  absl::MutexLock lock(&mutex_);
  std::erase(attached_, health);
}

void HealthBoard::SetModels(std::set<std::string> models) {
  absl::MutexLock lock(&mutex_);
  models_ = std::move(models);
  models_.erase("");  // the name of the whole server
  Apply();
}

void HealthBoard::StopServing() {
  absl::MutexLock lock(&mutex_);
  ready_ = false;
  Apply();
}

void HealthBoard::Apply() {
  known_.insert(models_.begin(), models_.end());
  for (grpc::HealthCheckServiceInterface* health : attached_) {
    for (const std::string& model : known_) {
      health->SetServingStatus(model, ready_ && models_.contains(model));
    }
    health->SetServingStatus(kCompressionService, ready_);
  }
}

}  // namespace keepset::service
