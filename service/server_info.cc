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

v1::Device* FindOrAdd(const std::string& uuid, const std::string& name,
                      v1::GetServerInfoResponse& info) {
  for (v1::Device& listed : *info.mutable_devices()) {
    if (listed.uuid() == uuid) return &listed;
  }
  v1::Device* const added = info.add_devices();
  added->set_uuid(uuid);
  added->set_name(name);
  return added;
}

// The backend's device first, then what the transports' driver sees beside it.
void DescribeDevices(const kernels::DeviceInfo& backend_device,
                     const std::vector<TransportSupport>& transports,
                     v1::GetServerInfoResponse& info) {
  v1::Device* const own = FindOrAdd(backend_device.uuid, backend_device.name, info);
  own->set_driver_version(backend_device.driver_version);
  own->set_compute_capability(backend_device.compute_capability);
  own->set_memory_bytes(static_cast<uint64_t>(backend_device.memory_bytes));
  v1::DeviceCapability* const compute = own->add_capabilities();
  compute->set_name("compute");
  compute->set_available(true);
  for (const TransportSupport& transport : transports) {
    for (const DeviceSupport& device : transport.devices) {
      v1::DeviceCapability* const capability =
          FindOrAdd(device.uuid, device.name, info)->add_capabilities();
      capability->set_name(transport.kind);
      capability->set_available(device.obstacle.empty());
      capability->set_reason(device.obstacle);
    }
  }
}

}  // namespace

v1::GetServerInfoResponse DescribeServer(const v1::ServerConfig& config,
                                         const kernels::ComputeBackend& backend,
                                         const std::vector<std::string>& policies,
                                         const std::vector<TransportSupport>& transports) {
  v1::GetServerInfoResponse info;
  info.set_version(std::string(ServerVersion()));
  info.set_build(KEEPSET_BUILD);
  for (const char* const extension : kExtensions) info.add_extensions(extension);
  if (config.memory().max_owned_bytes() > 0) info.add_extensions("owned_regions");
  info.add_transports("inline");
  for (const TransportSupport& transport : transports) {
    info.add_extensions(transport.kind);
    info.add_transports(transport.kind);
  }
  for (const std::string& policy : policies) info.add_policies(policy);
  info.set_backend(backend.name());
  if (const kernels::DeviceInfo device = backend.Device(); !device.uuid.empty()) {
    DescribeDevices(device, transports, info);
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
