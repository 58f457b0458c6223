#include "service/memory/host_mapping.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

// Part of the kernel's interface since Linux 5.1, absent from older headers.
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace keepset::service {
namespace {

constexpr char kHowToSeal[] =
    "want a memfd made with memfd_create(name, MFD_ALLOW_SEALING), sized with ftruncate and then "
    "sealed with fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)";

class HostRegion : public MappedRegion {
 public:
  HostRegion(UniqueFd fd, void* base, const RegionDescriptor& descriptor, SealPolicy seals)
      : kind_(descriptor.kind),
        fd_(std::move(fd)),
        base_(base),
        allocation_bytes_(descriptor.allocation_bytes),
        length_(static_cast<int64_t>(descriptor.length)),
        access_(descriptor.access),
        seals_(seals) {}
  ~HostRegion() override { ::munmap(base_, static_cast<size_t>(length_)); }

  absl::string_view kind() const override { return kind_; }
  std::byte* data() const override { return static_cast<std::byte*>(base_); }
  int64_t size_bytes() const override { return length_; }
  RegionAccess access() const override { return access_; }

  absl::Status Verify() const override {
    struct stat info;
    if (::fstat(fd_.get(), &info) != 0) {
      return absl::FailedPreconditionError("the region's memory object cannot be examined");
    }
    if (static_cast<uint64_t>(info.st_size) != allocation_bytes_) {
      return absl::FailedPreconditionError(absl::StrCat("the region's memory object has ",
                                                        info.st_size, " bytes, registered were ",
                                                        allocation_bytes_));
    }
    if (seals_ == SealPolicy::kShrinkRequired) {
      const int seals = ::fcntl(fd_.get(), F_GET_SEALS);
      if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
        return absl::FailedPreconditionError("the region's memory object lost F_SEAL_SHRINK");
      }
    }
    return absl::OkStatus();
  }

 private:
  const std::string kind_;
  const UniqueFd fd_;
  void* const base_;
  const uint64_t allocation_bytes_;
  const int64_t length_;
  const RegionAccess access_;
  const SealPolicy seals_;
};

absl::Status CheckRange(const RegionDescriptor& d, uint64_t object_bytes, uint64_t page_bytes) {
  if (d.allocation_bytes != object_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("allocation_bytes=", d.allocation_bytes,
                                                   ", want the object's size ", object_bytes));
  }
  if (d.length == 0) return absl::InvalidArgumentError("length=0, want at least 1 byte");
  if (d.offset > object_bytes || d.length > object_bytes - d.offset) {
    return absl::InvalidArgumentError(absl::StrCat("offset=", d.offset, " length=", d.length,
                                                   ", want offset + length <= ", object_bytes));
  }
  if (d.offset % page_bytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("offset=", d.offset, ", want a multiple of ", page_bytes));
  }
  return absl::OkStatus();
}

// The seals of the object; InvalidArgument when they do not satisfy `policy` and `access`.
absl::StatusOr<int> CheckSeals(int fd, SealPolicy policy, RegionAccess access) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (policy == SealPolicy::kShrinkRequired) {
    if (seals < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("the descriptor is not a memfd, ", kHowToSeal));
    }
    if ((seals & F_SEAL_SHRINK) == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("the memfd is not sealed against shrinking, ", kHowToSeal));
    }
  }
  const int known = seals < 0 ? 0 : seals;
  if (access == RegionAccess::kReadWrite && (known & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0) {
    return absl::InvalidArgumentError(
        "access=read-write of memory sealed against writing, want read-only");
  }
  return known;
}

absl::Status MapError(int error) {
  switch (error) {
    case EACCES:
    case EPERM:
      return absl::InvalidArgumentError(
          "the memory object does not permit the access asked, want a descriptor opened for it");
    case ENOMEM:
      return absl::ResourceExhaustedError("no address space left to map the region");
    case EMFILE:
    case ENFILE:
      return DescriptorError(error, "map the region");
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("the memory object cannot be mapped: ", std::strerror(error)));
  }
}

}  // namespace

absl::Status DescriptorError(int error, absl::string_view what) {
  if (error == EMFILE || error == ENFILE) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot ", what,
                     ": the server is out of file descriptors, raise its RLIMIT_NOFILE (every "
                     "region and every session's connection holds one)"));
  }
  return absl::InvalidArgumentError(absl::StrCat("cannot ", what, ": ", std::strerror(error)));
}

absl::StatusOr<std::unique_ptr<MappedRegion>> MapHostMemory(RegionDescriptor descriptor,
                                                            SealPolicy seals) {
  if (!descriptor.device_uuid.empty()) {
    return absl::InvalidArgumentError("device_uuid names a device, want it empty: host memory");
  }
  const int fd = descriptor.fd.get();
  struct stat info;
  struct statfs filesystem;
  if (fd < 0 || ::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) ||
      ::fstatfs(fd, &filesystem) != 0) {
    return absl::InvalidArgumentError("the descriptor is no memory object");
  }
  // No seal stops the owner from punching a hole. Ordinary pages then read as zero; a huge page
  // that the pool cannot give back is a SIGBUS here.
  if (filesystem.f_type == HUGETLBFS_MAGIC) {
    return absl::InvalidArgumentError(
        "the memory object is made of reserved huge pages, want ordinary pages (transparent huge "
        "pages are fine)");
  }
  KEEPSET_ASSIGN_OR_RETURN(const int present, CheckSeals(fd, seals, descriptor.access));
  KEEPSET_RETURN_IF_ERROR(CheckRange(descriptor, static_cast<uint64_t>(info.st_size),
                                     static_cast<uint64_t>(::sysconf(_SC_PAGESIZE))));

  const bool writes = descriptor.access == RegionAccess::kReadWrite;
  // Kernels before 6.7 refuse a shared mapping of write-sealed memory even for reading; its
  // contents cannot change, so a private one is the same.
  const int flags = (present & F_SEAL_WRITE) != 0 ? MAP_PRIVATE : MAP_SHARED;
  void* base = ::mmap(nullptr, descriptor.length, writes ? PROT_READ | PROT_WRITE : PROT_READ,
                      flags, fd, static_cast<off_t>(descriptor.offset));
  if (base == MAP_FAILED) return MapError(errno);
  UniqueFd owned = std::move(descriptor.fd);
  return std::make_unique<HostRegion>(std::move(owned), base, descriptor, seals);
}

}  // namespace keepset::service
