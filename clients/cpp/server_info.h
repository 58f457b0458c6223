// What a server says of itself.
#ifndef KEEPSET_CLIENTS_CPP_SERVER_INFO_H_
#define KEEPSET_CLIENTS_CPP_SERVER_INFO_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "clients/cpp/operation.h"

namespace keepset::client {

struct ServerInfo {
  std::string version;
  std::string build;
  std::vector<std::string> extensions;
  std::vector<std::string> policies;
  std::vector<std::string> transports;
  std::string backend;
  struct Device {
    std::string uuid;
    std::string name;
    std::string driver_version;
    // Of a device that the backend runs on.
    std::string compute_capability;
    uint64_t memory_bytes = 0;
    struct Capability {
      std::string name;  // "compute", or a kind of region
      bool available = false;
      std::string reason;  // why not
    };
    std::vector<Capability> capabilities;
  };
  std::vector<Device> devices;
  std::string device_status;
  struct Limits {
    uint64_t max_inline_bytes = 0;
    uint64_t max_seq_len = 0;
    uint64_t max_layers = 0;
    uint64_t max_regions_per_session = 0;
    uint64_t max_region_bytes_per_session = 0;
    uint64_t max_sessions = 0;
    uint64_t queue_capacity = 0;
    uint64_t stream_credits = 0;
  };
  Limits limits;
  int64_t default_lease_seconds = 0;
  std::vector<TableIdentity> tables;
  bool draining = false;
};

// Counts and times since the server began; the messages of server.proto say what each means.
struct ServerStatistics {
  struct Outcome {
    std::string outcome;
    std::string reason;
    uint64_t count = 0;
  };
  struct Stage {
    std::string stage;
    uint64_t count = 0;
    absl::Duration total;
    absl::Duration longest;
  };
  // Ended operations of one model, policy and table.
  struct Operations {
    std::string model;
    std::string policy;
    std::optional<TableIdentity> table;
    std::vector<Outcome> outcomes;
    std::vector<Stage> stages;
    uint64_t input_tokens = 0;
    uint64_t kept_tokens = 0;
    uint64_t bytes_before = 0;
    uint64_t bytes_after = 0;
  };

  absl::Duration uptime;
  std::vector<Operations> operations;
  // Now, of the whole server.
  int64_t operations_running = 0;
  int64_t queue_waiting = 0;
  int64_t sessions = 0;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_SERVER_INFO_H_
