// keepset info: what a server is, which tables it serves, and what it has done.
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
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
    Json capabilities = Json::array();
    for (const client::ServerInfo::Device::Capability& capability : device.capabilities) {
      capabilities.push_back({{"name", capability.name},
                              {"available", capability.available},
                              {"reason", capability.reason}});
    }
    devices.push_back({{"uuid", device.uuid},
                       {"name", device.name},
                       {"driver_version", device.driver_version},
                       {"compute_capability", device.compute_capability},
                       {"memory_bytes", device.memory_bytes},
                       {"capabilities", capabilities}});
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

// Empty for a server without a device.
std::string DeviceLines(const std::vector<client::ServerInfo::Device>& devices) {
  std::string lines;
  for (const client::ServerInfo::Device& device : devices) {
    absl::StrAppend(&lines, "            ", device.uuid, " ", device.name);
    if (!device.compute_capability.empty()) {
      absl::StrAppend(&lines, ", compute capability ", device.compute_capability, ", ",
                      device.memory_bytes >> 20, " MiB");
    }
    for (const client::ServerInfo::Device::Capability& capability : device.capabilities) {
      absl::StrAppend(&lines, ", ", capability.name,
                      capability.available ? "" : absl::StrCat(" not (", capability.reason, ")"));
    }
    absl::StrAppend(&lines, "\n");
  }
  return lines;
}

void PrintInfo(const client::ServerInfo& info, std::ostream& out) {
  out << "version     " << info.version << (info.build.empty() ? "" : absl::StrCat(" ", info.build))
      << "\n"
      << "backend     " << info.backend << "\n"
      << "device      " << info.device_status << "\n"
      << DeviceLines(info.devices) << "policies    " << absl::StrJoin(info.policies, " ") << "\n"
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

Json StatisticsJson(const client::ServerStatistics& statistics) {
  Json operations = Json::array();
  for (const client::ServerStatistics::Operations& row : statistics.operations) {
    Json outcomes = Json::array();
    for (const auto& outcome : row.outcomes) {
      outcomes.push_back(
          {{"outcome", outcome.outcome}, {"reason", outcome.reason}, {"count", outcome.count}});
    }
    Json stages = Json::array();
    for (const auto& stage : row.stages) {
      stages.push_back({{"stage", stage.stage},
                        {"count", stage.count},
                        {"total_seconds", absl::ToDoubleSeconds(stage.total)},
                        {"longest_seconds", absl::ToDoubleSeconds(stage.longest)}});
    }
    Json table;
    if (row.table.has_value()) {
      table = {{"name", row.table->name},
               {"version", row.table->version},
               {"digest", row.table->digest}};
    }
    operations.push_back({{"model", row.model},
                          {"policy", row.policy},
                          {"table", table},
                          {"outcomes", outcomes},
                          {"stages", stages},
                          {"input_tokens", row.input_tokens},
                          {"kept_tokens", row.kept_tokens},
                          {"bytes_before", row.bytes_before},
                          {"bytes_after", row.bytes_after}});
  }
  return {{"uptime_seconds", absl::ToDoubleSeconds(statistics.uptime)},
          {"operations_running", statistics.operations_running},
          {"queue_waiting", statistics.queue_waiting},
          {"sessions", statistics.sessions},
          {"operations", operations}};
}

void PrintStatistics(const client::ServerStatistics& statistics, std::ostream& out) {
  out << "uptime      " << absl::FormatDuration(absl::Trunc(statistics.uptime, absl::Seconds(1)))
      << "\n"
      << "running     " << statistics.operations_running << " operations, "
      << statistics.queue_waiting << " waiting\n"
      << "sessions    " << statistics.sessions << "\n";
  for (const client::ServerStatistics::Operations& row : statistics.operations) {
    out << "\n" << (row.model.empty() ? "(no model)" : row.model) << "  " << row.policy;
    if (row.table.has_value()) out << "  " << row.table->name << "@" << row.table->version;
    out << "\n";
    for (const auto& outcome : row.outcomes) {
      out << absl::StreamFormat("  %8d  %s%s\n", outcome.count, outcome.outcome,
                                outcome.reason == "none" ? "" : " " + outcome.reason);
    }
    for (const auto& stage : row.stages) {
      out << absl::StreamFormat(
          "  %-8s  mean %.3f ms, longest %.3f ms\n", stage.stage,
          absl::ToDoubleMilliseconds(stage.total) / static_cast<double>(stage.count),
          absl::ToDoubleMilliseconds(stage.longest));
    }
    out << absl::StreamFormat("  %-8s  %d of %d, bytes %d of %d\n", "kept", row.kept_tokens,
                              row.input_tokens, row.bytes_after, row.bytes_before);
  }
  if (statistics.operations.empty()) out << "no operation has ended yet\n";
}

}  // namespace

absl::Status RunInfo(absl::Span<const std::string> arguments, Console& console) {
  ServerFlags server;
  bool statistics = false;
  bool json = false;
  FlagParser parser("info", "info --server ADDR [--statistics] [--json]",
                    "What a server is, what it can do and which tables are active.");
  AddServerFlags(parser, &server)
      .Switch("--statistics",
              "instead: ended operations by model, policy and table, with outcomes and times",
              &statistics)
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
  client::ClientOptions options = server.Options();
  options.transport = client::Transport::kInline;
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, ConnectToServer(options));
  const auto print = [&](const auto& value, auto to_json, auto to_text) {
    if (json) {
      console.out << to_json(value).dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
    } else {
      to_text(value, console.out);
    }
  };
  if (statistics) {
    KEEPSET_ASSIGN_OR_RETURN(const client::ServerStatistics done,
                             client->GetStatistics(client::StatisticsOf::kServer));
    print(done, StatisticsJson, PrintStatistics);
  } else {
    KEEPSET_ASSIGN_OR_RETURN(const client::ServerInfo info, client->GetServerInfo());
    print(info, InfoJson, PrintInfo);
  }
  return absl::OkStatus();
}

}  // namespace keepset::cli
