#include "clients/cpp/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/status_macros.h"

namespace keepset::client {
namespace {

constexpr int kInitialReconnectMs = 100;
constexpr int kMaxReconnectMs = 2000;

absl::StatusOr<std::string> ReadPem(absl::string_view field, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    const int error = errno;
    return absl::InvalidArgumentError(
        absl::StrCat("tls ", field, " \"", path, "\": ", std::strerror(error)));
  }
  return text.str();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> TlsCredentials(const TlsOptions& tls) {
  if (tls.certificate_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("tls certificate \"", tls.certificate_file,
                                                   "\" and key \"", tls.key_file,
                                                   "\": a client certificate needs both"));
  }
  grpc::SslCredentialsOptions ssl;
  if (!tls.ca_file.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadPem("ca", tls.ca_file));
  }
  if (!tls.certificate_file.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(ssl.pem_cert_chain, ReadPem("certificate", tls.certificate_file));
    KEEPSET_ASSIGN_OR_RETURN(ssl.pem_private_key, ReadPem("key", tls.key_file));
  }
  return grpc::SslCredentials(ssl);
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> NewChannel(const ClientOptions& options) {
  if (!absl::StrContains(options.address, ':')) {
    return absl::InvalidArgumentError(absl::StrCat("server address \"", options.address,
                                                   "\", want unix:/path/to.sock or host:port"));
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kInitialReconnectMs);
  // In spite of its name, the time that one attempt to connect may take.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(options.connect_timeout)));
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kMaxReconnectMs);
  // Proxies of the environment are meant for other hosts than a sidecar.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (options.tls.has_value()) {
    if (absl::StartsWith(options.address, "unix:")) {
      return absl::InvalidArgumentError(
          absl::StrCat("TLS to ", options.address,
                       ": a Unix socket is guarded by its file mode, TLS is for host:port"));
    }
    KEEPSET_ASSIGN_OR_RETURN(credentials, TlsCredentials(*options.tls));
    if (!options.tls->server_name.empty()) {
      arguments.SetSslTargetNameOverride(options.tls->server_name);
    }
  }
  return grpc::CreateCustomChannel(options.address, credentials, arguments);
}

}  // namespace keepset::client
