#include "service/server_info.h"

#include "absl/strings/str_cat.h"
#include "service/server.h"

namespace keepset::service {
namespace {

// Of the wire contract (server.proto says what each means), beside the kinds of regions.
constexpr const char* kExtensions[] = {"stream",
                                       "early_layer_results",
                                       "gather_inline",
                                       "gather_destination",
                                       "gather_in_place",
                                       "row_positions",
                                       "window_lse_base2",
                                       "column_stats",
                                       "probe_rows",
                                       "layer_groups",
                                       "table_requirements",
                                       "shadow_table",
                                       "statistics",
                                       "qo_heads"};

}  // namespace

v1::GetServerInfoResponse DescribeServer(const v1::ServerConfig& config,
                                         const kernels::ComputeBackend& backend,
                                         const std::vector<std::string>& policies,
                                         const std::vector<std::string>& transport_kinds) {
  v1::GetServerInfoResponse info;
  info.set_version(std::string(ServerVersion()));
  info.set_build(KEEPSET_BUILD);
  for (const char* const extension : kExtensions) info.add_extensions(extension);
  info.add_transports("inline");
  for (const std::string& kind : transport_kinds) {
    info.add_extensions(kind);
    info.add_transports(kind);
  }
  for (const std::string& policy : policies) info.add_policies(policy);
  info.set_backend(backend.name());
  if (const kernels::DeviceInfo device = backend.Device(); !device.uuid.empty()) {
    v1::Device* const listed = info.add_devices();
    listed->set_uuid(device.uuid);
    listed->set_name(device.name);
    listed->set_driver_version(device.driver_version);
    info.set_device_status(device.note.empty() ? "ok" : absl::StrCat("ok: ", device.note));
  } else {
    info.set_device_status(
        absl::StrCat("no device: backend ", backend.name(), " works in host memory"));
  }
  v1::Limits* limits = info.mutable_limits();
  limits->set_max_inline_bytes(config.limits().max_inline_bytes());
  limits->set_max_seq_len(config.limits().max_seq_len());
  limits->set_max_layers(config.limits().max_layers());
  limits->set_max_regions_per_session(config.memory().max_regions_per_session());
  limits->set_max_region_bytes_per_session(config.memory().max_region_bytes_per_session());
  limits->set_max_sessions(config.memory().max_sessions());
  limits->set_queue_capacity(config.limits().queue_capacity());
  limits->set_stream_credits(config.limits().stream_credits());
  info.set_default_lease_seconds(config.memory().lease_seconds());
  return info;
}

}  // namespace keepset::service
