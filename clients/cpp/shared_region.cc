#include "clients/cpp/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace keepset::client {
namespace {

constexpr int64_t kAlignment = 64;
// Leaves room for rounding up to pages without overflow.
constexpr int64_t kMaxRegionBytes = int64_t{1} << 46;

absl::Status KernelError(const char* call, int64_t bytes, int error) {
  return absl::ResourceExhaustedError(
      absl::StrCat("shared region of ", bytes, " bytes: ", call, ": ", std::strerror(error)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<SharedRegion>> SharedRegion::Create(const std::string& label,
                                                                   int64_t size_bytes) {
  if (size_bytes < 1 || size_bytes > kMaxRegionBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("shared region: size_bytes=", size_bytes, ", want 1..", kMaxRegionBytes));
  }
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t mapped = (size_bytes + page - 1) / page * page;
  const int fd = memfd_create(label.c_str(), MFD_ALLOW_SEALING | MFD_CLOEXEC);
  if (fd < 0) return KernelError("memfd_create", mapped, errno);
  if (ftruncate(fd, mapped) != 0) {
    const int error = errno;
    close(fd);
    return KernelError("ftruncate", mapped, error);
  }
  // The server refuses a memfd that could shrink under its mapping.
  if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    const int error = errno;
    close(fd);
    return KernelError("F_ADD_SEALS", mapped, error);
  }
  void* data = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    close(fd);
    return KernelError("mmap", mapped, error);
  }
  return std::unique_ptr<SharedRegion>(new SharedRegion(fd, static_cast<std::byte*>(data), mapped));
}

SharedRegion::~SharedRegion() {
  munmap(data_, size_bytes_);
  close(fd_);
}

bool SharedRegion::Contains(const void* begin, int64_t bytes) const {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const auto first = reinterpret_cast<uintptr_t>(data_);
  return bytes >= 0 && bytes <= size_bytes_ && address >= first &&
         address - first <= static_cast<uintptr_t>(size_bytes_ - bytes);
}

int64_t SharedRegion::AllocationBytes(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

absl::StatusOr<std::byte*> SharedRegion::Allocate(int64_t bytes) {
  if (bytes < 0 || bytes > size_bytes_ || AllocationBytes(bytes) > size_bytes_ - used_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "shared region: ", bytes, " bytes do not fit, ", size_bytes_ - used_bytes_, " are free"));
  }
  std::byte* out = data_ + used_bytes_;
  used_bytes_ += AllocationBytes(bytes);
  return out;
}

}  // namespace keepset::client
