// keepset health: what grpc.health.v1 of a server says, for probes. Opens no session, so it answers
// while every session is taken.
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <grpcpp/generic/generic_stub.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "base/status_macros.h"
#include "clients/cli/command_list.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/server_connection.h"
#include "clients/cpp/channel.h"

namespace keepset::cli {
namespace {

using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;

// HealthCheckRequest.service, field 1, a string; HealthCheckResponse.status, field 1, an enum.
constexpr uint32_t kServiceTag = 0x0a;
constexpr uint32_t kStatusTag = 0x08;
constexpr uint32_t kServing = 1;
constexpr char kMethod[] = "/grpc.health.v1.Health/Check";

std::string EncodeRequest(const std::string& service) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    CodedOutputStream out(&stream);
    if (!service.empty()) {
      out.WriteTag(kServiceTag);
      out.WriteVarint32(static_cast<uint32_t>(service.size()));
      out.WriteString(service);
    }
  }
  return bytes;
}

// The status field; 0 ("unknown") where the answer does not hold it.
uint32_t DecodeStatus(const grpc::ByteBuffer& response) {
  grpc::Slice slice;
  if (!response.DumpToSingleSlice(&slice).ok()) return 0;
  CodedInputStream in(slice.begin(), static_cast<int>(slice.size()));
  uint32_t status = 0;
  if (in.ReadTag() != kStatusTag || !in.ReadVarint32(&status)) return 0;
  return status;
}

absl::Status CheckHealth(const client::ClientOptions& options, const std::string& service,
                         std::chrono::milliseconds timeout) {
  absl::StatusOr<std::shared_ptr<grpc::Channel>> channel = client::NewChannel(options);
  if (!channel.ok()) return WithExitCode(channel.status(), ExitCode::kUsage);
  const std::string& server = options.address;
  const std::string bytes = EncodeRequest(service);
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::GenericStub stub(*std::move(channel));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout);
  grpc::Status status;
  absl::Notification done;
  stub.UnaryCall(&context, kMethod, grpc::StubOptions(), &request, &response,
                 [&](grpc::Status answer) {
                   status = std::move(answer);
                   done.Notify();
                 });
  done.WaitForNotification();
  if (status.error_code() == grpc::StatusCode::NOT_FOUND) {
    return RefusedError(absl::StrCat("service \"", service, "\": not known to ", server,
                                     ", want nothing (live), keepset.v1.CompressionService "
                                     "(ready) or the architecture of an active table"));
  }
  if (!status.ok()) {
    return WithExitCode(absl::UnavailableError(absl::StrCat("no keepsetd answers at ", server, " (",
                                                            status.error_message(), ")")),
                        ExitCode::kUnreachable);
  }
  if (DecodeStatus(response) != kServing) {
    return WithExitCode(absl::UnavailableError(
                            absl::StrCat("service \"", service, "\" at ", server, ": not serving")),
                        ExitCode::kUnreachable);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunHealth(absl::Span<const std::string> arguments, Console& console) {
  constexpr int64_t kMaxTimeoutMs = 600000;
  ServerFlags server;
  std::optional<std::string> service;
  std::optional<int64_t> timeout_ms;
  bool json = false;
  FlagParser parser("health", "health --server ADDR [--service NAME] [--timeout-ms N] [--json]",
                    "Exit code 0 when the server, or one of its services, is serving; 4 when not "
                    "or when\nnobody answers in time.");
  AddServerFlags(parser, &server)
      .Text("--service", "NAME",
            "keepset.v1.CompressionService (ready for work) or an architecture; default: live",
            &service)
      .Int("--timeout-ms", "N", "how long to wait for the answer, default 1000", &timeout_ms)
      .Switch("--json", "one JSON document", &json);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_RETURN_IF_ERROR(parser.Parse(arguments, 0, 0).status());
  KEEPSET_RETURN_IF_ERROR(server.Check());
  if (!server.address.has_value()) {
    return UsageError("--server is missing, want unix:/path/to.sock or host:port");
  }
  const int64_t wait_ms = timeout_ms.value_or(1000);
  if (wait_ms < 1 || wait_ms > kMaxTimeoutMs) {
    return UsageError(absl::StrCat("--timeout-ms=", wait_ms, ", want 1..", kMaxTimeoutMs));
  }
  KEEPSET_RETURN_IF_ERROR(
      CheckHealth(server.Options(), service.value_or(""), std::chrono::milliseconds(wait_ms)));
  console.out << (json ? "{\"status\":\"serving\"}" : "serving") << "\n";
  return absl::OkStatus();
}

}  // namespace keepset::cli
