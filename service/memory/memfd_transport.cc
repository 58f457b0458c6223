// Memory of a memfd passed over the side socket, either way. F_SEAL_SHRINK is required and cannot
// be taken back, so the client can never pull pages from under a mapping.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/memory/host_mapping.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {
namespace {

absl::Status NoMemory(absl::string_view call, uint64_t bytes, int error) {
  return absl::ResourceExhaustedError(
      absl::StrCat("memory of ", bytes, " bytes: ", call, ": ", std::strerror(error)));
}

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

  uint64_t AllocationBytes(uint64_t length) const override {
    const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
    return (length + page - 1) / page * page;
  }
  // The kernel keeps the pages for whoever maps them.
  EarlyFree early_free() const override { return EarlyFree::kHarmless; }

  absl::StatusOr<OwnedMemory> Create(uint64_t length, const std::string& device_uuid) override {
    RegionDescriptor descriptor;
    descriptor.kind = std::string(kind());
    descriptor.allocation_bytes = AllocationBytes(length);
    descriptor.length = length;
    descriptor.device_uuid = device_uuid;
    descriptor.access = RegionAccess::kReadWrite;
    descriptor.fd.Reset(::memfd_create("keepset-owned", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    const int fd = descriptor.fd.get();
    if (fd < 0) return DescriptorError(errno, "make memory");
    if (::ftruncate(fd, static_cast<off_t>(descriptor.allocation_bytes)) != 0) {
      return NoMemory("ftruncate", descriptor.allocation_bytes, errno);
    }
    // The worker can neither resize it nor stop us from writing.
    if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
      return NoMemory("F_ADD_SEALS", descriptor.allocation_bytes, errno);
    }
    OwnedMemory memory;
    memory.fd.Reset(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!memory.fd.valid()) return DescriptorError(errno, "make memory");
    KEEPSET_ASSIGN_OR_RETURN(memory.region,
                             MapHostMemory(std::move(descriptor), SealPolicy::kShrinkRequired));
    return memory;
  }
};

}  // namespace

std::unique_ptr<MemoryTransport> NewMemfdTransport() { return std::make_unique<MemfdTransport>(); }

}  // namespace keepset::service
