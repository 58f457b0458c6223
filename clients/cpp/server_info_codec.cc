#include "clients/cpp/server_info_codec.h"

#include <string>
#include <vector>

#include "absl/time/time.h"

namespace keepset::client {
namespace {

template <typename Repeated>
std::vector<std::string> Strings(const Repeated& values) {
  return {values.begin(), values.end()};
}

TableIdentity DecodeIdentity(const v1::TableIdentity& table) {
  return {table.name(), table.version(), table.digest(), table.source()};
}

}  // namespace

ServerInfo DecodeServerInfo(const v1::GetServerInfoResponse& response) {
  ServerInfo info;
  info.version = response.version();
  info.build = response.build();
  info.extensions = Strings(response.extensions());
  info.policies = Strings(response.policies());
  info.transports = Strings(response.transports());
  info.backend = response.backend();
  for (const v1::Device& device : response.devices()) {
    ServerInfo::Device& listed = info.devices.emplace_back(
        ServerInfo::Device{.uuid = device.uuid(),
                           .name = device.name(),
                           .driver_version = device.driver_version(),
                           .compute_capability = device.compute_capability(),
                           .memory_bytes = device.memory_bytes(),
                           .capabilities = {}});
    for (const v1::DeviceCapability& capability : device.capabilities()) {
      listed.capabilities.push_back(
          {capability.name(), capability.available(), capability.reason()});
    }
  }
  info.device_status = response.device_status();
  const v1::Limits& limits = response.limits();
  info.limits = {limits.max_inline_bytes(),
                 limits.max_seq_len(),
                 limits.max_layers(),
                 limits.max_regions_per_session(),
                 limits.max_region_bytes_per_session(),
                 limits.max_sessions(),
                 limits.queue_capacity(),
                 limits.stream_credits()};
  info.default_lease_seconds = response.default_lease_seconds();
  for (const v1::TableIdentity& table : response.tables()) {
    info.tables.push_back(DecodeIdentity(table));
  }
  info.draining = response.draining();
  return info;
}

ServerStatistics DecodeStatistics(const v1::GetStatisticsResponse& response) {
  ServerStatistics statistics;
  statistics.uptime = absl::Seconds(response.uptime_seconds());
  for (const v1::OperationStatistics& wire : response.operations()) {
    ServerStatistics::Operations& row = statistics.operations.emplace_back();
    row.model = wire.model();
    row.policy = wire.policy();
    if (wire.has_table()) row.table = DecodeIdentity(wire.table());
    for (const v1::OutcomeStatistics& outcome : wire.outcomes()) {
      row.outcomes.push_back({outcome.outcome(), outcome.reason(), outcome.count()});
    }
    for (const v1::StageStatistics& stage : wire.stages()) {
      row.stages.push_back({stage.stage(), stage.count(), absl::Seconds(stage.total_seconds()),
                            absl::Seconds(stage.longest_seconds())});
    }
    row.input_tokens = wire.input_tokens();
    row.kept_tokens = wire.kept_tokens();
    row.bytes_before = wire.bytes_before();
    row.bytes_after = wire.bytes_after();
  }
  statistics.operations_running = response.operations_running();
  statistics.queue_waiting = response.queue_waiting();
  statistics.sessions = response.sessions();
  return statistics;
}

}  // namespace keepset::client
