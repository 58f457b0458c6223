#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "service/memory/memory_transport.h"
#include "service/memory/session_manager.h"

namespace keepset::service {

absl::StatusOr<OwnedMemory> MemoryTransport::Create(uint64_t /*length*/,
                                                    const std::string& /*device_uuid*/) {
  return absl::InvalidArgumentError(
      absl::StrCat("kind=\"", kind(),
                   "\": the server makes no memory of this kind, want memfd, cuda_ipc or "
                   "cuda_vmm"));
}

#define KEEPSET_TRANSPORT(kind, factory) std::unique_ptr<MemoryTransport> factory();
#include "service/memory/transports.def"
#undef KEEPSET_TRANSPORT

std::vector<std::unique_ptr<MemoryTransport>> NewBuiltinTransports(
    const std::function<bool(absl::string_view kind)>& allow) {
  std::vector<std::unique_ptr<MemoryTransport>> transports;
  const auto add = [&](absl::string_view kind, std::unique_ptr<MemoryTransport> transport) {
    KEEPSET_CHECK(transport->kind() == kind);
    for (const auto& other : transports) KEEPSET_CHECK(other->kind() != kind);
    if (allow(kind)) transports.push_back(std::move(transport));
  };
#define KEEPSET_TRANSPORT(kind, factory) add(#kind, factory());
#include "service/memory/transports.def"
#undef KEEPSET_TRANSPORT
  return transports;
}

}  // namespace keepset::service
