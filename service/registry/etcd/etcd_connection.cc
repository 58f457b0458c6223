#include "service/registry/etcd/etcd_connection.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "etcd/rpc.grpc.pb.h"

namespace keepset::service::etcd {
namespace {

// How soon gRPC tries a refused address again; how often we ask for it is the caller's.
constexpr int kReconnectMs = 100;

absl::StatusOr<std::string> ReadFile(absl::string_view field, const std::string& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  // Not by iterators: they throw where reading fails, of a directory for example.
  std::string text;
  char buffer[4096];
  while (file.read(buffer, sizeof(buffer)), file.gcount() > 0) text.append(buffer, file.gcount());
  if (!file.is_open() || file.bad()) {
    return absl::FailedPreconditionError(
        absl::StrCat("etcd.", field, "=\"", path, "\": ", std::strerror(errno == 0 ? EIO : errno)));
  }
  return text;
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> Credentials(const ClientOptions& options,
                                                                      Endpoint::Security security) {
  if (security == Endpoint::Security::kPlain) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions ssl;
  if (!options.ca_file.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadFile("ca_file", options.ca_file));
  }
  if (!options.certificate_file.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(ssl.pem_cert_chain,
                             ReadFile("certificate_file", options.certificate_file));
    KEEPSET_ASSIGN_OR_RETURN(ssl.pem_private_key, ReadFile("key_file", options.key_file));
  }
  return grpc::SslCredentials(ssl);
}

absl::Status BadEndpoint(absl::string_view endpoint, absl::string_view want) {
  return absl::InvalidArgumentError(
      absl::StrCat("etcd.endpoints: \"", endpoint, "\", want ", want));
}

bool IsThisHost(absl::string_view address) {
  return absl::StartsWith(address, "127.") || absl::StartsWith(address, "[::1]:") ||
         absl::StartsWith(address, "localhost:");
}

// A token is dropped by a restart of its endpoint, when it expires and when users change.
bool IsTokenRefused(const absl::Status& status) {
  return absl::IsUnauthenticated(status) ||
         absl::StrContains(status.message(), "revision of auth store is old");
}

}  // namespace

absl::StatusOr<std::vector<Endpoint>> ParseEndpoints(const ClientOptions& options) {
  if (options.endpoints.empty()) {
    return absl::InvalidArgumentError("etcd.endpoints: none, want at least one host:port");
  }
  if (options.certificate_file.empty() != options.key_file.empty()) {
    return absl::InvalidArgumentError("etcd: want both certificate_file and key_file, or neither");
  }
  if (!options.username.empty() && options.password_file.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("etcd.username=\"", options.username, "\" without password_file"));
  }
  const bool has_tls_files = !options.ca_file.empty() || !options.certificate_file.empty();
  std::vector<Endpoint> endpoints;
  for (const std::string& text : options.endpoints) {
    absl::string_view rest = text;
    Endpoint endpoint;
    endpoint.security = has_tls_files ? Endpoint::Security::kTls : Endpoint::Security::kPlain;
    if (absl::ConsumePrefix(&rest, "https://")) {
      endpoint.security = Endpoint::Security::kTls;
    } else if (absl::ConsumePrefix(&rest, "http://") && has_tls_files) {
      return BadEndpoint(text, "https:// beside ca_file or certificate_file");
    }
    absl::ConsumeSuffix(&rest, "/");
    const size_t colon = rest.rfind(':');
    uint32_t port = 0;
    if (colon == absl::string_view::npos || colon == 0 ||
        !absl::SimpleAtoi(rest.substr(colon + 1), &port) || port < 1 || port > 65535) {
      return BadEndpoint(text, "host:port with port 1..65535");
    }
    endpoint.address = std::string(rest);
    if (!endpoints.empty() && endpoints[0].security != endpoint.security) {
      return BadEndpoint(text, "all endpoints with TLS or all without");
    }
    if (!options.username.empty() && endpoint.security == Endpoint::Security::kPlain &&
        !IsThisHost(endpoint.address)) {
      return BadEndpoint(text, "https://: the password would cross the network in the clear");
    }
    endpoints.push_back(std::move(endpoint));
  }
  return endpoints;
}

void Connection::Prepare(grpc::ClientContext& context) const {
  // A member cut off from its cluster would let a watch stand and tell nothing.
  context.AddMetadata("hasleader", "true");
  if (!token.empty()) context.AddMetadata("token", token);
}

absl::Status Connection::StatusOf(absl::string_view call, const grpc::Status& status) const {
  if (status.ok()) return absl::OkStatus();
  return {static_cast<absl::StatusCode>(status.error_code()),
          absl::StrCat("etcd ", address, ": ", call, ": ", status.error_message())};
}

bool IsUnreachable(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
}

absl::StatusOr<Connections::ConnectionPtr> Connections::Call(absl::string_view name,
                                                             const Attempt& attempt) {
  absl::Status last;
  bool logged_in_again = false;
  for (size_t tried = 0; tried < endpoints_.size();) {
    absl::StatusOr<Current> current = Acquire();
    if (!current.ok()) {
      last = current.status();
      if (!IsUnreachable(last)) return last;
      ++tried;
      continue;
    }
    last = CallOnce(name, *current->connection, attempt);
    if (last.ok()) return current->connection;
    if (IsTokenRefused(last) && !options_.username.empty() && !logged_in_again) {
      logged_in_again = true;
      Drop(current->connection, Next::kSameEndpoint);
      continue;
    }
    if (!IsUnreachable(last)) return last;
    // A connection from before may have broken long ago, which says nothing about the endpoint.
    const bool is_stale = current->age == Current::Age::kUsed && absl::IsUnavailable(last);
    Drop(current->connection, is_stale ? Next::kSameEndpoint : Next::kNextEndpoint);
    if (!is_stale) ++tried;
  }
  return last;
}

absl::Status Connections::CallOnce(absl::string_view name, const Connection& connection,
                                   const Attempt& attempt) {
  grpc::ClientContext context;
  connection.Prepare(context);
  context.set_deadline(std::chrono::system_clock::now() +
                       absl::ToChronoMicroseconds(options_.request_timeout));
  {
    absl::MutexLock lock(&mutex_);
    if (shut_down_) return absl::CancelledError("etcd: the client was shut down");
    running_.insert(&context);
  }
  const absl::Cleanup finished = [&] {
    absl::MutexLock lock(&mutex_);
    running_.erase(&context);
  };
  return connection.StatusOf(name, attempt(connection, context));
}

absl::StatusOr<Connections::Current> Connections::Acquire() {
  size_t turn;
  {
    absl::MutexLock lock(&mutex_);
    if (connection_ != nullptr) return Current{connection_, Current::Age::kUsed};
    turn = turn_;
  }
  absl::StatusOr<ConnectionPtr> connection = Connect(endpoints_[turn]);
  absl::MutexLock lock(&mutex_);
  if (!connection.ok()) {
    if (turn_ == turn) turn_ = (turn + 1) % endpoints_.size();
    return connection.status();
  }
  connection_ = *connection;
  return Current{*std::move(connection), Current::Age::kNew};
}

absl::StatusOr<Connections::ConnectionPtr> Connections::Connect(const Endpoint& endpoint) {
  KEEPSET_ASSIGN_OR_RETURN(const auto credentials, Credentials(options_, endpoint.security));
  const int keepalive_ms = static_cast<int>(absl::ToInt64Milliseconds(options_.keepalive));
  grpc::ChannelArguments arguments;
  // A range or a transaction holds whole tables.
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive_ms);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, keepalive_ms / 2);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMs);
  // In spite of its name, the time that one attempt to connect may take.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(options_.request_timeout)));
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectMs);
  // A new connection is one, not the share of a broken one.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // A proxy of the environment is for the web.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  auto connection = std::make_shared<Connection>();
  connection->address = endpoint.address;
  connection->channel = grpc::CreateCustomChannel(endpoint.address, credentials, arguments);
  if (!options_.username.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(connection->token, LogIn(*connection));
  }
  return ConnectionPtr(std::move(connection));
}

absl::StatusOr<std::string> Connections::LogIn(const Connection& connection) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string password,
                           ReadFile("password_file", options_.password_file));
  etcdserverpb::AuthenticateRequest request;
  request.set_name(options_.username);
  // Files end in a newline that is no part of the password.
  request.set_password(std::string(absl::StripTrailingAsciiWhitespace(password)));
  etcdserverpb::AuthenticateResponse response;
  KEEPSET_RETURN_IF_ERROR(
      CallOnce("Authenticate", connection, [&](const Connection& to, grpc::ClientContext& context) {
        return etcdserverpb::Auth::NewStub(to.channel)->Authenticate(&context, request, &response);
      }));
  return response.token();
}

void Connections::Drop(const ConnectionPtr& connection, Next next) {
  absl::MutexLock lock(&mutex_);
  if (connection_ != connection) return;
  connection_ = nullptr;
  if (next == Next::kNextEndpoint) turn_ = (turn_ + 1) % endpoints_.size();
}

void Connections::UseNextEndpoint() {
  absl::MutexLock lock(&mutex_);
  connection_ = nullptr;
  turn_ = (turn_ + 1) % endpoints_.size();
}

void Connections::Shutdown() {
  absl::MutexLock lock(&mutex_);
  shut_down_ = true;
  for (grpc::ClientContext* context : running_) context->TryCancel();
}

}  // namespace keepset::service::etcd
