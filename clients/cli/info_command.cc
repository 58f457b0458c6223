// keepset info: what a server is and which tables it serves.
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "clients/cli/command_list.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/server_connection.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

Json InfoJson(const client::ServerInfo& info) {
  Json devices = Json::array();
  for (const client::ServerInfo::Device& device : info.devices) {
    devices.push_back(
        {{"uuid", device.uuid}, {"name", device.name}, {"driver_version", device.driver_version}});
  }
  Json tables = Json::array();
  for (const client::TableIdentity& table : info.tables) {
    tables.push_back({{"name", table.name},
                      {"version", table.version},
                      {"digest", table.digest},
                      {"source", table.source}});
  }
  const client::ServerInfo::Limits& limits = info.limits;
  return {{"version", info.version},
          {"build", info.build},
          {"backend", info.backend},
          {"policies", info.policies},
          {"transports", info.transports},
          {"extensions", info.extensions},
          {"devices", devices},
          {"device_status", info.device_status},
          {"tables", tables},
          {"limits",
           {{"max_inline_bytes", limits.max_inline_bytes},
            {"max_seq_len", limits.max_seq_len},
            {"max_layers", limits.max_layers},
            {"max_regions_per_session", limits.max_regions_per_session},
            {"max_region_bytes_per_session", limits.max_region_bytes_per_session},
            {"max_sessions", limits.max_sessions},
            {"queue_capacity", limits.queue_capacity},
            {"stream_credits", limits.stream_credits}}},
          {"default_lease_seconds", info.default_lease_seconds},
          {"draining", info.draining}};
}

void PrintInfo(const client::ServerInfo& info, std::ostream& out) {
  out << "version     " << info.version << (info.build.empty() ? "" : absl::StrCat(" ", info.build))
      << "\n"
      << "backend     " << info.backend << "\n"
      << "device      " << info.device_status << "\n"
      << "policies    " << absl::StrJoin(info.policies, " ") << "\n"
      << "transports  " << absl::StrJoin(info.transports, " ") << "\n"
      << "extensions  " << absl::StrJoin(info.extensions, " ") << "\n"
      << "inline      at most " << info.limits.max_inline_bytes << " bytes\n"
      << "draining    " << (info.draining ? "yes" : "no") << "\n";
  for (const client::TableIdentity& table : info.tables) {
    out << "table       " << table.name << " " << table.version << " " << table.source << " "
        << table.digest << "\n";
  }
  if (info.tables.empty()) out << "table       none active\n";
}

}  // namespace

absl::Status RunInfo(absl::Span<const std::string> arguments, Console& console) {
  ServerFlags server;
  bool json = false;
  FlagParser parser("info", "info --server ADDR [--json]",
                    "What a server is, what it can do and which tables are active.");
  AddServerFlags(parser, &server).Switch("--json", "one JSON document", &json);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_RETURN_IF_ERROR(parser.Parse(arguments, 0, 0).status());
  KEEPSET_RETURN_IF_ERROR(server.Check());
  if (!server.address.has_value()) {
    return UsageError("--server is missing, want unix:/path/to.sock or host:port");
  }
  client::ClientOptions options = server.Options();
  options.transport = client::Transport::kInline;
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, ConnectToServer(options));
  KEEPSET_ASSIGN_OR_RETURN(const client::ServerInfo info, client->GetServerInfo());
  if (json) {
    console.out << InfoJson(info).dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
  } else {
    PrintInfo(info, console.out);
  }
  return absl::OkStatus();
}

}  // namespace keepset::cli
