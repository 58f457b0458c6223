#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "tables/file_bytes.h"
#include "tables/safetensors.h"

namespace keepset::tables {
namespace {

struct TemporaryFile {
  int fd = -1;
  std::string path;
};

// The name begins with a dot so that directory watchers pass over a file that is still written.
absl::StatusOr<TemporaryFile> CreateTemporary(const std::string& directory,
                                              const std::string& target) {
  std::random_device entropy;
  for (int attempt = 0; attempt < 100; ++attempt) {
    TemporaryFile file;
    file.path = absl::StrFormat("%s/.keepset-%08x%08x.tmp", directory, entropy(), entropy());
    file.fd = ::open(file.path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file.fd >= 0) return file;
    if (errno != EEXIST) return FileError(errno, "create a file in the directory of", target);
  }
  return absl::InternalError(absl::StrCat(target, ": found no free temporary name"));
}

enum class Syncing { kNone, kFileAndDirectory };

absl::Status WriteAll(int fd, absl::string_view bytes, Syncing syncing, const std::string& target) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(errno, "write", target);
    bytes.remove_prefix(n);
  }
  if (syncing == Syncing::kFileAndDirectory && ::fsync(fd) != 0) {
    return FileError(errno, "sync", target);
  }
  return absl::OkStatus();
}

// A rename replaces a symbolic link, or a device, by a file. A link is followed instead; anything
// that is no regular file is refused.
absl::StatusOr<std::string> ResolveTarget(const std::string& path) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return path;
    return FileError(errno, "write", path);
  }
  std::string target = path;
  if (S_ISLNK(info.st_mode)) {
    std::error_code error;
    target = std::filesystem::canonical(path, error).string();
    if (error) return FileError(error.value(), "follow the link", path);
    if (::stat(target.c_str(), &info) != 0) return FileError(errno, "write", path);
  }
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": exists and is not a regular file, want a file name"));
  }
  return target;
}

absl::Status Replace(const std::string& path, absl::string_view bytes, Syncing syncing) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string target, ResolveTarget(path));
  std::string directory = std::filesystem::path(target).parent_path().string();
  if (directory.empty()) directory = ".";
  const int directory_fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory_fd < 0) return FileError(errno, "open the directory of", path);
  absl::Cleanup close_directory = [directory_fd] { ::close(directory_fd); };

  KEEPSET_ASSIGN_OR_RETURN(const TemporaryFile file, CreateTemporary(directory, path));
  absl::Cleanup remove_temporary = [&file] { ::unlink(file.path.c_str()); };
  const absl::Status written = WriteAll(file.fd, bytes, syncing, path);
  if (::close(file.fd) != 0 && written.ok()) return FileError(errno, "close", path);
  KEEPSET_RETURN_IF_ERROR(written);
  if (::rename(file.path.c_str(), target.c_str()) != 0) return FileError(errno, "rename to", path);
  std::move(remove_temporary).Cancel();
  // Some file systems cannot sync a directory and say EINVAL; the file itself is on disk.
  // After another failure the new file stays: it is whole, and what it replaced is gone already.
  const bool sync = syncing == Syncing::kFileAndDirectory;
  if (sync && ::fsync(directory_fd) != 0 && errno != EINVAL) {
    return FileError(errno, "sync the directory of", path);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteFileAtomically(const std::string& path, absl::string_view bytes) {
  return Replace(path, bytes, Syncing::kFileAndDirectory);
}

absl::Status ReplaceFile(const std::string& path, absl::string_view bytes) {
  return Replace(path, bytes, Syncing::kNone);
}

}  // namespace keepset::tables
