#include "service/registry/directory_watch.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"

namespace keepset::service {
namespace {

// Not IN_MODIFY: a file is read when its writer has closed it. IN_ATTRIB brings back a file that
// was unreadable until its mode changed.
constexpr uint32_t kEvents = IN_CLOSE_WRITE | IN_MOVED_TO | IN_MOVED_FROM | IN_CREATE | IN_DELETE |
                             IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR;

}  // namespace

absl::StatusOr<std::unique_ptr<DirectoryWatch>> DirectoryWatch::New() {
  const int inotify_fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
  if (inotify_fd < 0) {
    return absl::ResourceExhaustedError(absl::StrCat("no inotify instance: ", std::strerror(errno),
                                                     ", see fs.inotify.max_user_instances"));
  }
  const int stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (stop_fd < 0) {
    const int error = errno;
    close(inotify_fd);
    return absl::ResourceExhaustedError(absl::StrCat("no eventfd: ", std::strerror(error)));
  }
  return absl::WrapUnique(new DirectoryWatch(inotify_fd, stop_fd));
}

DirectoryWatch::~DirectoryWatch() {
  close(stop_fd_);
  close(inotify_fd_);
}

absl::Status DirectoryWatch::Watch(const std::string& path) {
  const int watch = inotify_add_watch(inotify_fd_, path.c_str(), kEvents);
  const int error = errno;
  // Another directory stands at the path now: the old one, if it still exists, is none of ours.
  if (watch_ >= 0 && watch_ != watch) inotify_rm_watch(inotify_fd_, watch_);
  watch_ = watch;
  if (watch >= 0) return absl::OkStatus();
  const std::string message = absl::StrCat(path, ": cannot watch: ", std::strerror(error));
  switch (error) {
    case ENOENT:
      return absl::NotFoundError(message);
    case EACCES:
      return absl::PermissionDeniedError(message);
    case ENOTDIR:
      return absl::InvalidArgumentError(absl::StrCat(message, ", want a directory of tables"));
    case ENOSPC:
      return absl::ResourceExhaustedError(
          absl::StrCat(message, ", see fs.inotify.max_user_watches"));
    default:
      return absl::InternalError(message);
  }
}

DirectoryWatch::Wake DirectoryWatch::Wait(absl::Duration timeout) {
  pollfd fds[] = {{stop_fd_, POLLIN, 0}, {inotify_fd_, POLLIN, 0}};
  // Rounded up: a wait that ends just before its deadline would spin.
  const int64_t ms = std::clamp<int64_t>(
      absl::ToInt64Milliseconds(absl::Ceil(timeout, absl::Milliseconds(1))), 0, 3'600'000);
  if (poll(fds, 2, static_cast<int>(ms)) <= 0) return Wake::kTimeout;
  if (fds[0].revents != 0) return Wake::kStopped;
  alignas(inotify_event) char buffer[4096];
  while (read(inotify_fd_, buffer, sizeof(buffer)) > 0) {
  }
  return Wake::kChanged;
}

void DirectoryWatch::Stop() {
  const uint64_t one = 1;
  // Fails only when the counter is full, which wakes Wait as well.
  (void)!write(stop_fd_, &one, sizeof(one));
}

}  // namespace keepset::service
