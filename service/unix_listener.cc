#include "service/unix_listener.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {
namespace {

// In the private directory.
constexpr absl::string_view kSocketName = "/s";

std::string ErrorText(int error) { return std::strerror(error); }

// OK when the path is free or holds a socket that nobody listens on.
absl::Status CheckFree(const std::string& path) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return absl::OkStatus();
    const int error = errno;
    return absl::FailedPreconditionError(
        absl::StrCat("listen unix:", path, ": ", ErrorText(error)));
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat("listen unix:", path, ": the file exists and is no socket"));
  }
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("listen unix:", path, ": the path is too long"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 &&
      errno == ECONNREFUSED) {
    return absl::OkStatus();
  }
  return absl::AlreadyExistsError(
      absl::StrCat("listen unix:", path, ": in use by a running server"));
}

class PrivateDirListener final : public UnixListener {
 public:
  PrivateDirListener(std::string path, mode_t mode, std::string directory)
      : path_(std::move(path)),
        mode_(mode),
        directory_(std::move(directory)),
        private_path_(absl::StrCat(directory_, kSocketName)) {}

  ~PrivateDirListener() override {
    ::unlink(private_path_.c_str());
    ::rmdir(directory_.c_str());
    struct stat info;
    // A server that replaced ours keeps its socket.
    if (published_ && ::lstat(path_.c_str(), &info) == 0 && info.st_ino == inode_) {
      ::unlink(path_.c_str());
    }
  }

  const std::string& private_path() const override { return private_path_; }

  absl::Status Publish() override {
    struct stat info;
    if (::chmod(private_path_.c_str(), mode_) != 0 || ::lstat(private_path_.c_str(), &info) != 0 ||
        ::rename(private_path_.c_str(), path_.c_str()) != 0) {
      const int error = errno;
      return absl::FailedPreconditionError(
          absl::StrCat("listen unix:", path_, ": ", ErrorText(error)));
    }
    inode_ = info.st_ino;
    published_ = true;
    return absl::OkStatus();
  }

 private:
  const std::string path_;
  const mode_t mode_;
  const std::string directory_;
  const std::string private_path_;
  bool published_ = false;
  ino_t inode_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<UnixListener>> UnixListener::Prepare(const std::string& path,
                                                                    mode_t mode) {
  KEEPSET_RETURN_IF_ERROR(CheckFree(path));
  const size_t slash = path.rfind('/');
  const std::string parent = slash == std::string::npos ? "." : path.substr(0, slash);
  std::string directory = absl::StrCat(parent, "/.ksXXXXXX");
  if (directory.size() + kSocketName.size() >= sizeof(sockaddr_un::sun_path)) {
    return absl::InvalidArgumentError(
        absl::StrCat("listen unix:", path, ": its directory has a path of ", parent.size(),
                     " bytes, want at most ",
                     sizeof(sockaddr_un::sun_path) - 1 - kSocketName.size() -
                         (directory.size() - parent.size())));
  }
  if (::mkdtemp(directory.data()) == nullptr) {
    const int error = errno;
    return absl::FailedPreconditionError(
        absl::StrCat("listen unix:", path, ": directory ", parent, ": ", ErrorText(error),
                     ", want one this process can write (--listen unix:PATH)"));
  }
  return std::make_unique<PrivateDirListener>(path, mode, std::move(directory));
}

}  // namespace keepset::service
