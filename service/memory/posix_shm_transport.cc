// Memory of a POSIX shared memory object, opened by name with this process's own rights.
//
// Weaker than a memfd in two ways, which is why servers take it only when configured: a name can be
// guessed, and such an object cannot be sealed. Verify compares its size when an operation leases
// it, but an owner that truncates it *during* the operation makes the next access a SIGBUS.
#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>
#include <utility>

#include "absl/strings/ascii.h"
#include "service/memory/host_mapping.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {
namespace {

constexpr size_t kMaxNameBytes = 255;

bool IsValidName(absl::string_view name) {
  if (name.size() < 2 || name.size() > kMaxNameBytes || name[0] != '/') return false;
  if (name == "/." || name == "/..") return false;
  for (const char c : name.substr(1)) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != '-') {
      return false;
    }
  }
  return true;
}

class PosixShmTransport : public MemoryTransport {
 public:
  absl::string_view kind() const override { return "posix_shm"; }
  bool needs_fd() const override { return false; }

  absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor descriptor) override {
    if (!IsValidName(descriptor.name)) {
      return absl::InvalidArgumentError(
          "posix_name is not a shared memory name, want \"/\" and 1..254 of A-Z a-z 0-9 . _ -");
    }
    const int mode = descriptor.access == RegionAccess::kReadWrite ? O_RDWR : O_RDONLY;
    descriptor.fd.Reset(::shm_open(descriptor.name.c_str(), mode | O_CLOEXEC, 0));
    if (!descriptor.fd.valid()) {
      // Absent and forbidden look alike, so that names of others cannot be probed.
      if (errno == EMFILE || errno == ENFILE) return DescriptorError(errno, "open posix_name");
      return absl::InvalidArgumentError("no shared memory object of this name can be opened");
    }
    return MapHostMemory(std::move(descriptor), SealPolicy::kNone);
  }
};

}  // namespace

std::unique_ptr<MemoryTransport> NewPosixShmTransport() {
  return std::make_unique<PosixShmTransport>();
}

}  // namespace keepset::service
