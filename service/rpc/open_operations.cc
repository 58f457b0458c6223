#include "service/rpc/open_operations.h"

#include <utility>

namespace keepset::service {

OperationPtr OpenOperations::Find(uint64_t id) const {
  const auto it = open_.find(id);
  return it == open_.end() ? nullptr : it->second;
}

std::vector<uint64_t> OpenOperations::WithoutEnd() const {
  std::vector<uint64_t> ids;
  for (const auto& [id, operation] : open_) {
    if (!operation->end_received) ids.push_back(id);
  }
  return ids;
}

void OpenOperations::Open(const OperationPtr& operation) {
  ended_.Remove(operation->id);
  open_[operation->id] = operation;
}

OperationPtr OpenOperations::Take(uint64_t id, const absl::Status& why) {
  const auto it = open_.find(id);
  if (it == open_.end()) return nullptr;
  OperationPtr operation = std::move(it->second);
  open_.erase(it);
  operation->dropped = why;
  ended_.Add(id);
  return operation;
}

std::vector<OperationPtr> OpenOperations::TakeAll(const absl::Status& why) {
  std::vector<OperationPtr> operations;
  for (auto& [id, operation] : open_) {
    operation->dropped = why;
    operations.push_back(std::move(operation));
  }
  open_.clear();
  return operations;
}

bool OpenOperations::Conclude(StreamOperation& operation) {
  if (!operation.dropped.ok()) return false;
  operation.dropped = absl::CancelledError("answered");
  open_.erase(operation.id);
  ended_.Add(operation.id);
  return true;
}

}  // namespace keepset::service
