#include "tables/file_bytes.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace keepset::tables {
namespace {

// Two looks at a file that was not written in between.
bool SameContentStamp(const struct stat& a, const struct stat& b) {
  return a.st_size == b.st_size && a.st_mtim.tv_sec == b.st_mtim.tv_sec &&
         a.st_mtim.tv_nsec == b.st_mtim.tv_nsec && a.st_ctim.tv_sec == b.st_ctim.tv_sec &&
         a.st_ctim.tv_nsec == b.st_ctim.tv_nsec;
}

absl::StatusOr<std::string> ReadAll(int fd, int64_t size, const std::string& path) {
  std::string bytes(static_cast<std::size_t>(size), '\0');
  int64_t done = 0;
  while (done < size) {
    const ssize_t n = ::pread(fd, bytes.data() + done, size - done, done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "read", path);
    if (n == 0) break;
    done += n;
  }
  bytes.resize(done);
  return bytes;
}

}  // namespace

absl::Status FileError(int error_number, absl::string_view action, absl::string_view path) {
  const std::string message =
      absl::StrCat(path, ": cannot ", action, ": ", std::strerror(error_number));
  switch (error_number) {
    case ENOENT:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EMFILE:
    case ENFILE:
    case ENOMEM:
      return absl::ResourceExhaustedError(message);
    case EISDIR:
    case ENOTDIR:
    case ENAMETOOLONG:
    case ELOOP:
      return absl::InvalidArgumentError(message);
    default:
      return absl::InternalError(message);
  }
}

absl::StatusOr<std::unique_ptr<FileBytes>> FileBytes::Open(const std::string& path, ReadMode mode) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return FileError(errno, "open", path);
  absl::Cleanup close_fd = [fd] { ::close(fd); };
  struct stat before;
  if (::fstat(fd, &before) != 0) return FileError(errno, "stat", path);
  if (!S_ISREG(before.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file, want one"));
  }
  auto file = std::unique_ptr<FileBytes>(new FileBytes());
  if (mode == ReadMode::kMap) {
    if (before.st_size == 0) return file;
    void* address = ::mmap(nullptr, before.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (address == MAP_FAILED) return FileError(errno, "map", path);
    file->mapping_ = address;
    file->mapping_bytes_ = before.st_size;
    return file;
  }
  if (before.st_size > kMaxCopiedFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": file_bytes=", before.st_size,
                                                   ", want at most ", kMaxCopiedFileBytes));
  }
  absl::StatusOr<std::string> copy = ReadAll(fd, before.st_size, path);
  if (!copy.ok()) return copy.status();
  struct stat after;
  if (::fstat(fd, &after) != 0) return FileError(errno, "stat", path);
  if (copy->size() != before.st_size || !SameContentStamp(before, after)) {
    return absl::AbortedError(
        absl::StrCat(path, ": changed while it was read, want a file written aside and renamed"));
  }
  file->copy_ = *std::move(copy);
  return file;
}

std::unique_ptr<FileBytes> FileBytes::CopyOf(absl::Span<const std::byte> bytes) {
  auto file = std::unique_ptr<FileBytes>(new FileBytes());
  file->copy_.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return file;
}

std::unique_ptr<FileBytes> FileBytes::Own(std::string bytes) {
  auto file = std::unique_ptr<FileBytes>(new FileBytes());
  file->copy_ = std::move(bytes);
  return file;
}

void FileBytes::ReleasePages() const {
  if (mapping_ != nullptr) ::madvise(mapping_, mapping_bytes_, MADV_DONTNEED);
}

FileBytes::~FileBytes() {
  if (mapping_ != nullptr) ::munmap(mapping_, mapping_bytes_);
}

absl::Span<const std::byte> FileBytes::bytes() const {
  if (mapping_ != nullptr) return {static_cast<const std::byte*>(mapping_), mapping_bytes_};
  return {reinterpret_cast<const std::byte*>(copy_.data()), copy_.size()};
}

}  // namespace keepset::tables
