#include "service/registry/stable_read.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "service/registry/file_lease.h"

namespace keepset::service {
namespace {

// As large as a table file may be (tables/ refuses larger ones).
constexpr int64_t kMaxFileBytes = int64_t{1} << 30;

absl::Status FileError(int error, absl::string_view action, const std::string& path) {
  const std::string message = absl::StrCat(path, ": cannot ", action, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(message);
    case EMFILE:
    case ENFILE:
    case ENOMEM:
      return absl::ResourceExhaustedError(message);
    case ELOOP:
    case ENOTDIR:
    case ENAMETOOLONG:
    case ENXIO:
      return absl::InvalidArgumentError(message);
    default:
      return absl::InternalError(message);
  }
}

int64_t UnixNanos(const timespec& t) { return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec; }

absl::StatusOr<FileIdentity> IdentityOf(const struct stat& st, const std::string& path) {
  if (!S_ISREG(st.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file, want a table"));
  }
  if (st.st_size > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": file_bytes=", st.st_size, ", want at most ", kMaxFileBytes));
  }
  return FileIdentity{st.st_dev, st.st_ino, st.st_size, UnixNanos(st.st_mtim),
                      UnixNanos(st.st_ctim)};
}

absl::Status NotNow(const std::string& path, absl::string_view why) {
  return absl::UnavailableError(absl::StrCat(path, ": ", why));
}

}  // namespace

absl::StatusOr<FileIdentity> IdentityOf(const std::string& path) {
  struct stat st;
  if (stat(path.c_str(), &st) != 0) return FileError(errno, "stat", path);
  return IdentityOf(st, path);
}

absl::StatusOr<std::string> ReadStable(const std::string& path, const FileIdentity& expected,
                                       absl::Duration unchanged_for, LeaseUse lease_use) {
  // Without O_NONBLOCK a file that became a FIFO, or one leased to somebody else, would hold us.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) {
    if (errno == EWOULDBLOCK) return NotNow(path, "leased to another process");
    return FileError(errno, "open", path);
  }
  const absl::Cleanup close_fd = [fd] { close(fd); };

  std::optional<FileLease> lease;
  if (lease_use == LeaseUse::kWhereGranted) lease.emplace(fd);
  const FileLease::State state = lease ? lease->state() : FileLease::State::kUnsupported;
  if (state == FileLease::State::kWriterActive) return NotNow(path, "open for writing");
  if (state == FileLease::State::kUnsupported && unchanged_for < kSettleTime) {
    return NotNow(path, "changed a moment ago");
  }

  const auto unchanged = [&]() -> absl::StatusOr<bool> {
    struct stat st;
    if (fstat(fd, &st) != 0) return FileError(errno, "stat", path);
    KEEPSET_ASSIGN_OR_RETURN(const FileIdentity now, IdentityOf(st, path));
    return now == expected;
  };
  KEEPSET_ASSIGN_OR_RETURN(const bool same_before, unchanged());
  if (!same_before) return NotNow(path, "changed before it was read");

  std::string bytes(static_cast<size_t>(expected.size_bytes), '\0');
  int64_t done = 0;
  while (done < expected.size_bytes) {
    const ssize_t n = pread(fd, bytes.data() + done, expected.size_bytes - done, done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "read", path);
    if (n == 0) return NotNow(path, "became shorter while it was read");
    done += n;
  }

  // A lease whose break is ignored for long enough is taken away.
  KEEPSET_ASSIGN_OR_RETURN(const bool same_after, unchanged());
  if (!same_after) return NotNow(path, "changed while it was read");
  return bytes;
}

}  // namespace keepset::service
