// Wakes a thread when the entries of one directory change (inotify) or when it is told to stop.
#ifndef KEEPSET_SERVICE_REGISTRY_DIRECTORY_WATCH_H_
#define KEEPSET_SERVICE_REGISTRY_DIRECTORY_WATCH_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace keepset::service {

// One thread calls Watch and Wait; Stop may be called from any.
class DirectoryWatch {
 public:
  enum class Wake { kChanged, kTimeout, kStopped };

  // ResourceExhausted: no inotify instance left.
  static absl::StatusOr<std::unique_ptr<DirectoryWatch>> New();
  ~DirectoryWatch();
  DirectoryWatch(const DirectoryWatch&) = delete;
  DirectoryWatch& operator=(const DirectoryWatch&) = delete;

  // Watches the directory that is at `path` now; again after it was deleted, moved or replaced.
  // NotFound, PermissionDenied, InvalidArgument (not a directory), ResourceExhausted (no watch
  // left).
  absl::Status Watch(const std::string& path);

  // kChanged: something happened since the last call, or events were lost. Events say when to look
  // and never what is there; they are drained, not interpreted.
  Wake Wait(absl::Duration timeout);

  // Every Wait from now on returns kStopped.
  void Stop();

 private:
  DirectoryWatch(int inotify_fd, int stop_fd) : inotify_fd_(inotify_fd), stop_fd_(stop_fd) {}

  const int inotify_fd_;
  const int stop_fd_;
  int watch_ = -1;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_DIRECTORY_WATCH_H_
