#include "service/registry/file_lease.h"

#include <fcntl.h>
#include <signal.h>

#include <cerrno>

namespace keepset::service {

FileLease::FileLease(int fd) : fd_(fd) {
  // Before the lease: a notice sent in between would already be a SIGIO.
  if (fcntl(fd_, F_SETSIG, SIGURG) != 0) return;
  if (fcntl(fd_, F_SETLEASE, F_RDLCK) == 0) {
    state_ = State::kHeld;
  } else if (errno == EAGAIN) {
    state_ = State::kWriterActive;
  }
}

FileLease::~FileLease() {
  if (state_ == State::kHeld) fcntl(fd_, F_SETLEASE, F_UNLCK);
}

}  // namespace keepset::service
