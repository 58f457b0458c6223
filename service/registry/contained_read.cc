#include "service/registry/contained_read.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "tables/file_bytes.h"

namespace keepset::service {
namespace {

bool SameState(const struct stat& a, const struct stat& b) {
  return a.st_size == b.st_size && a.st_mtim.tv_sec == b.st_mtim.tv_sec &&
         a.st_mtim.tv_nsec == b.st_mtim.tv_nsec && a.st_ctim.tv_sec == b.st_ctim.tv_sec &&
         a.st_ctim.tv_nsec == b.st_ctim.tv_nsec;
}

}  // namespace

absl::StatusOr<std::string> ReadContained(const std::string& directory, const std::string& path,
                                          int64_t max_bytes) {
  const int directory_fd = open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (directory_fd < 0) return tables::FileError(errno, "open", directory);
  const absl::Cleanup close_directory = [directory_fd] { close(directory_fd); };
  open_how how = {};
  how.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  const int fd =
      static_cast<int>(syscall(SYS_openat2, directory_fd, path.c_str(), &how, sizeof(how)));
  if (fd < 0) {
    const int error = errno;
    if (error == ENOSYS) {
      return absl::UnimplementedError(
          absl::StrCat(path, ": this kernel has no openat2, want the table inline"));
    }
    if (error == EXDEV || error == ENXIO || path.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("path=\"", path.substr(0, 256), "\", want a file inside ", directory));
    }
    return tables::FileError(error, "open", path);
  }
  const absl::Cleanup close_fd = [fd] { close(fd); };
  struct stat before;
  if (fstat(fd, &before) != 0) return tables::FileError(errno, "stat", path);
  if (!S_ISREG(before.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file, want a table"));
  }
  if (before.st_size > max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": file_bytes=", before.st_size, ", want at most ", max_bytes));
  }
  std::string bytes(static_cast<size_t>(before.st_size), '\0');
  int64_t done = 0;
  while (done < before.st_size) {
    const ssize_t n = pread(fd, bytes.data() + done, before.st_size - done, done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return tables::FileError(errno, "read", path);
    if (n == 0) break;
    done += n;
  }
  struct stat after;
  if (fstat(fd, &after) != 0) return tables::FileError(errno, "stat", path);
  if (done != before.st_size || !SameState(before, after)) {
    return absl::AbortedError(absl::StrCat(path, ": changed while it was read, try again"));
  }
  return bytes;
}

}  // namespace keepset::service
