// The client's end of the side socket, which hands file descriptors to keepsetd and back
// (proto/side_socket_wire.h). The connection stands for the session: closing it ends the session.
#ifndef KEEPSET_CLIENTS_CPP_SIDE_SOCKET_H_
#define KEEPSET_CLIENTS_CPP_SIDE_SOCKET_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace keepset::client {

// Thread-safe. An exchange without its reply (DeadlineExceeded, Internal) ends the connection and
// with it the session: every later call answers Unavailable.
class SideSocket {
 public:
  // Connects and redeems the one-time token. `timeout` bounds this and every later exchange.
  // Unavailable: nobody listens there. InvalidArgument: path too long, token of the wrong size.
  // Otherwise the server's code, PermissionDenied for a wrong or used token.
  static absl::StatusOr<std::unique_ptr<SideSocket>> Connect(const std::string& path,
                                                             absl::string_view token,
                                                             absl::Duration timeout);
  ~SideSocket();
  SideSocket(const SideSocket&) = delete;
  SideSocket& operator=(const SideSocket&) = delete;

  // Passes a duplicate of `fd`; the answer is the token RegisterRegion names.
  absl::StatusOr<uint64_t> PassFd(int fd);
  // The descriptor behind a token of AllocateRegion, once; the caller closes it. NotFound: not a
  // token of this session, or it was used.
  absl::StatusOr<int> FetchFd(uint64_t fd_token);

 private:
  explicit SideSocket(int socket) : socket_(socket) {}

  const int socket_;
  absl::Mutex exchange_mutex_;  // one frame and its reply at a time
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_SIDE_SOCKET_H_
