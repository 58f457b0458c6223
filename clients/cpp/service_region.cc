#include "clients/cpp/service_region.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "clients/cpp/service_mapping.h"

namespace keepset::client {

ServiceRegion::ServiceRegion(std::string name, ServiceMemory memory, int64_t offset,
                             std::unique_ptr<ServiceMapping> mapping, std::function<void()> forget,
                             std::function<absl::Status()> tell_server)
    : name_(std::move(name)),
      memory_(std::move(memory)),
      offset_(offset),
      forget_(std::move(forget)),
      tell_server_(std::move(tell_server)),
      mapping_(std::move(mapping)) {}

ServiceRegion::~ServiceRegion() { static_cast<void>(Retire()); }

std::byte* ServiceRegion::data() const {
  absl::MutexLock lock(&mutex_);
  return mapping_ == nullptr ? nullptr : mapping_->data() + offset_;
}

bool ServiceRegion::Contains(const void* data, int64_t size_bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(this->data());
  const auto first = reinterpret_cast<uintptr_t>(data);
  return begin != 0 && size_bytes >= 0 && first >= begin && size_bytes <= memory_.size_bytes &&
         first - begin <= static_cast<uintptr_t>(memory_.size_bytes - size_bytes);
}

absl::Status ServiceRegion::status() const {
  absl::MutexLock lock(&mutex_);
  return status_;
}

void ServiceRegion::NoteLost() const {
  absl::MutexLock lock(&mutex_);
  if (!status_.ok()) return;
  const absl::string_view what_to_do = memory_.kind == "memfd"
                                           ? "copy what is needed, retire it and allocate another"
                                           : "use nothing of it, retire it and allocate another";
  status_ = absl::FailedPreconditionError(absl::StrCat(
      "region \"", name_, "\": it belonged to the session before this one, ", what_to_do));
}

absl::Status ServiceRegion::Retire() {
  absl::MutexLock retire_lock(&retire_mutex_);
  forget_();
  std::unique_ptr<ServiceMapping> mapping;
  {
    absl::MutexLock lock(&mutex_);
    if (mapping_ != nullptr) {
      mapping = std::move(mapping_);
      status_ = absl::FailedPreconditionError(absl::StrCat("region \"", name_, "\" is retired"));
    }
  }
  if (mapping != nullptr) {
    if (const absl::Status unmapped = mapping->Unmap(); !unmapped.ok()) {
      unmapped_ = absl::Status(
          unmapped.code(),
          absl::StrCat("region \"", name_,
                       "\": not unmapped, so the server is not told: ", unmapped.message()));
    }
    mapping.reset();
  }
  KEEPSET_RETURN_IF_ERROR(unmapped_);
  if (is_told_) return absl::OkStatus();
  absl::Status told = tell_server_();
  is_told_ = told.ok() || absl::IsNotFound(told);
  return told;
}

}  // namespace keepset::client
