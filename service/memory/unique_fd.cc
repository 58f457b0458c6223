#include <unistd.h>

#include "service/memory/memory_transport.h"

namespace keepset::service {

void UniqueFd::Reset(int fd) {
  if (fd_ >= 0 && fd_ != fd) ::close(fd_);
  fd_ = fd;
}

}  // namespace keepset::service
