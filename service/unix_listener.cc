#include "service/unix_listener.h"

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
#include "service/memory/socket_path.h"

namespace keepset::service {
namespace {

// In the private directory.
constexpr absl::string_view kSocketName = "/s";

std::string ErrorText(int error) { return std::strerror(error); }

std::string LabelOf(const std::string& path) { return absl::StrCat("listen unix:", path); }

class PrivateDirListener final : public UnixListener {
 public:
  PrivateDirListener(SocketPath path, mode_t mode, std::string directory)
      : path_(std::move(path)),
        mode_(mode),
        directory_(std::move(directory)),
        private_path_(absl::StrCat(directory_, kSocketName)) {}

  ~PrivateDirListener() override {
    if (published_) return;
    ::unlink(private_path_.c_str());
    ::rmdir(directory_.c_str());
  }

  const std::string& private_path() const override { return private_path_; }

  absl::Status Publish() override {
    if (::chmod(private_path_.c_str(), mode_) != 0 ||
        ::rename(private_path_.c_str(), path_.path().c_str()) != 0) {
      const int error = errno;
      return absl::FailedPreconditionError(
          absl::StrCat(LabelOf(path_.path()), ": ", ErrorText(error)));
    }
    published_ = true;
    ::rmdir(directory_.c_str());
    return path_.NoteSocket();
  }

 private:
  SocketPath path_;
  const mode_t mode_;
  const std::string directory_;
  const std::string private_path_;
  bool published_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<UnixListener>> UnixListener::Prepare(const std::string& path,
                                                                    mode_t mode) {
  KEEPSET_ASSIGN_OR_RETURN(SocketPath claimed, SocketPath::Claim(path, LabelOf(path)));
  const size_t slash = path.rfind('/');
  const std::string parent = slash == std::string::npos ? "." : path.substr(0, slash);
  std::string directory = absl::StrCat(parent, "/.ksXXXXXX");
  if (directory.size() + kSocketName.size() >= sizeof(sockaddr_un::sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(
        LabelOf(path), ": its directory has a path of ", parent.size(), " bytes, want at most ",
        sizeof(sockaddr_un::sun_path) - 1 - kSocketName.size() -
            (directory.size() - parent.size())));
  }
  if (::mkdtemp(directory.data()) == nullptr) {
    const int error = errno;
    return absl::FailedPreconditionError(
        absl::StrCat(LabelOf(path), ": directory ", parent, ": ", ErrorText(error),
                     ", want one this process can write (--listen unix:PATH)"));
  }
  return std::make_unique<PrivateDirListener>(std::move(claimed), mode, std::move(directory));
}

}  // namespace keepset::service
