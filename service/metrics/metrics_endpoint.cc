#include "service/metrics/metrics_endpoint.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "prometheus/exposer.h"

namespace keepset::service {
namespace {

struct HostPort {
  std::string host;  // as written, brackets included
  uint32_t port = 0;
};

// The web server's own syntax would also accept lists, "s" and "r" suffixes and bare ports; only
// host:port gets through here.
absl::StatusOr<HostPort> ParseAddress(const std::string& address) {
  const absl::Status bad = absl::InvalidArgumentError(absl::StrCat(
      "metrics address \"", address, "\", want host:port, for example 127.0.0.1:9464"));
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0) return bad;
  HostPort result;
  result.host = address.substr(0, colon);
  const std::string port = address.substr(colon + 1);
  if (port.empty() || port.find_first_not_of("0123456789") != std::string::npos) return bad;
  if (!absl::SimpleAtoi(port, &result.port) || result.port > 65535) return bad;
  if (result.host.find_first_of(", \t\n") != std::string::npos) return bad;
  const bool bracketed = result.host.front() == '[' && result.host.back() == ']';
  if (!bracketed && result.host.find(':') != std::string::npos) return bad;
  return result;
}

// Where a client of `where` connects or a server binds; the caller frees it.
absl::StatusOr<addrinfo*> Resolve(const HostPort& where, int flags) {
  const std::string host(absl::StripSuffix(absl::StripPrefix(where.host, "["), "]"));
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | flags;
  addrinfo* found = nullptr;
  if (const int rc = getaddrinfo(host.c_str(), absl::StrCat(where.port).c_str(), &hints, &found);
      rc != 0) {
    return absl::InvalidArgumentError(absl::StrCat("host ", host, ": ", gai_strerror(rc)));
  }
  return found;
}

// The web server says only that it could not start; binding once more tells why.
absl::Status WhyNotBound(const std::string& address, const HostPort& where,
                         absl::string_view library_says) {
  const absl::StatusOr<addrinfo*> resolved = Resolve(where, AI_PASSIVE);
  if (!resolved.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address ", address, ": ", resolved.status().message()));
  }
  addrinfo* const found = *resolved;
  int error = 0;
  const int fd = socket(found->ai_family, found->ai_socktype | SOCK_CLOEXEC, found->ai_protocol);
  if (fd < 0) {
    error = errno;
  } else {
    const int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, 1) != 0) error = errno;
    close(fd);
  }
  freeaddrinfo(found);
  const std::string where_text = absl::StrCat("metrics address ", address);
  switch (error) {
    case EADDRINUSE:
      return absl::AlreadyExistsError(absl::StrCat(where_text, ": port is taken, want a free one"));
    case EACCES:
      return absl::PermissionDeniedError(
          absl::StrCat(where_text, ": this user may not bind it, want a port above 1023"));
    case EADDRNOTAVAIL:
      return absl::InvalidArgumentError(
          absl::StrCat(where_text, ": not an address of this machine"));
    default:
      return absl::InternalError(
          absl::StrCat(where_text, ": listener did not start: ", library_says));
  }
}

class ExposerEndpoint : public MetricsEndpoint {
 public:
  ExposerEndpoint(std::unique_ptr<prometheus::Exposer> exposer, HostPort bound)
      : exposer_(std::move(exposer)),
        bound_(std::move(bound)),
        address_(absl::StrCat(bound_.host, ":", bound_.port)) {}

  // The web server looks at its stop flag only when a connection arrives or two seconds have
  // passed; connections of our own keep the process from ending that much later.
  ~ExposerEndpoint() override {
    absl::Notification stopped;
    std::thread stopper([this, &stopped] {
      exposer_.reset();
      stopped.Notify();
    });
    while (!stopped.WaitForNotificationWithTimeout(absl::Milliseconds(10))) Knock();
    stopper.join();
  }

  const std::string& address() const override { return address_; }

 private:
  void Knock() const {
    const absl::StatusOr<addrinfo*> peer = Resolve(bound_, 0);
    if (!peer.ok()) return;
    const int fd = socket((*peer)->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0) {
      (void)connect(fd, (*peer)->ai_addr, (*peer)->ai_addrlen);
      close(fd);
    }
    freeaddrinfo(*peer);
  }

  std::unique_ptr<prometheus::Exposer> exposer_;
  const HostPort bound_;
  const std::string address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsEndpoint>> MetricsEndpoint::Start(
    const std::string& address, const std::weak_ptr<prometheus::Collectable>& page) {
  KEEPSET_ASSIGN_OR_RETURN(const HostPort where, ParseAddress(address));
  std::unique_ptr<prometheus::Exposer> exposer;
  std::vector<int> ports;
  try {
    exposer = std::make_unique<prometheus::Exposer>(std::vector<std::string>{
        "listening_ports", absl::StrCat(where.host, ":", where.port), "num_threads", "2"});
    exposer->RegisterCollectable(page);
    ports = exposer->GetListeningPorts();
  } catch (const std::exception& e) {
    return WhyNotBound(address, where, e.what());
  }
  if (ports.size() != 1) {
    return absl::InternalError(
        absl::StrCat("metrics address ", address, ": ", ports.size(), " ports bound, want 1"));
  }
  return std::make_unique<ExposerEndpoint>(std::move(exposer),
                                           HostPort{where.host, static_cast<uint32_t>(ports[0])});
}

}  // namespace keepset::service
