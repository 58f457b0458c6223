// Memory of a memfd passed over the side socket. F_SEAL_SHRINK is required and cannot be taken
// back, so the client can never pull pages from under a mapping.
#include <utility>

#include "service/memory/host_mapping.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {
namespace {

class MemfdTransport : public MemoryTransport {
 public:
  absl::string_view kind() const override { return "memfd"; }
  bool needs_fd() const override { return true; }

  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor descriptor) override {
    if (!descriptor.name.empty()) {
      return absl::InvalidArgumentError("a memfd region is named by its fd_token, not posix_name");
    }
    return MapHostMemory(std::move(descriptor), SealPolicy::kShrinkRequired);
  }
};

}  // namespace

std::unique_ptr<MemoryTransport> NewMemfdTransport() { return std::make_unique<MemfdTransport>(); }

}  // namespace keepset::service
