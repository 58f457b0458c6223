// How a server reaches the etcd that decides about its tables, and what it accepts from there.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_SOURCE_OPTIONS_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_SOURCE_OPTIONS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace keepset::service {

struct EtcdClientOptions {
  // "host:port", "http://host:port" or "https://host:port"; TLS for https and wherever one of the
  // three files below is given.
  std::vector<std::string> endpoints;
  std::string ca_file;  // empty: the system's certificates
  std::string certificate_file;
  std::string key_file;
  std::string username;  // empty: no login
  std::string password_file;
  // For one call at one endpoint.
  absl::Duration request_timeout = absl::Seconds(3);
  // A connection that does not answer a ping for this long is dead. etcd refuses more than one ping
  // in 5 s.
  absl::Duration keepalive = absl::Seconds(10);
};

struct EtcdSourceOptions {
  EtcdClientOptions client;
  std::string prefix = "/keepset";
  // Larger values are refused, and larger uploads go to the shared directory. etcd itself takes
  // requests up to 1.5 MiB unless it is told otherwise.
  int64_t max_value_bytes = int64_t{1} << 20;
  std::string shared_directory;  // of tables that etcd names by digest and path; empty: none
  // How long Start waits for etcd's first answer. Without one the server starts all the same.
  absl::Duration start_timeout = absl::Seconds(5);
  // How often a missing file of the shared directory is looked for.
  absl::Duration file_retry = absl::Seconds(5);
  // Pause after the first failed attempt to reach etcd; twice as long after each further one.
  absl::Duration first_pause = absl::Milliseconds(100);
  absl::Duration last_pause = absl::Seconds(5);
  uint64_t seed = 0;  // of the pauses: servers of a fleet should not come back in one moment
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_SOURCE_OPTIONS_H_
