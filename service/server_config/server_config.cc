#include "service/server_config/server_config.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/cuda_abi.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

constexpr absl::string_view kDefaultListen = "unix:/run/keepset/keepset.sock";
constexpr absl::string_view kDefaultMetrics = "127.0.0.1:9464";
// A Unix socket path must fit sockaddr_un.
constexpr size_t kMaxUnixPath = 107;
// Less would fit no memory of a device.
constexpr uint64_t kLeastOwnedBytes = cuda_abi::kAllocationGranularity;

class ErrorCollector final : public google::protobuf::io::ErrorCollector {
 public:
  explicit ErrorCollector(absl::string_view label) : label_(label) {}

  void AddError(int line, int column, const std::string& message) override {
    errors_.push_back(absl::StrCat(label_, ":", line + 1, ":", column + 1, ": ", message));
  }
  const std::vector<std::string>& errors() const { return errors_; }

 private:
  const std::string label_;
  std::vector<std::string> errors_;
};

// `others`: what the field takes beside it, for the message.
absl::Status CheckPort(absl::string_view field, absl::string_view address,
                       absl::string_view others = "") {
  const size_t colon = address.rfind(':');
  uint32_t port = 0;
  if (colon == absl::string_view::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": \"", address, "\", want host:port with port 0..65535", others));
  }
  return absl::OkStatus();
}

absl::Status CheckListen(const v1::ServerConfig& config) {
  for (const std::string& address : config.listen()) {
    const absl::string_view path = UnixPath(address);
    if (!path.empty()) {
      if (path.size() > kMaxUnixPath) {
        return absl::InvalidArgumentError(absl::StrCat("listen: socket path of ", path.size(),
                                                       " bytes, want at most ", kMaxUnixPath));
      }
      continue;
    }
    KEEPSET_RETURN_IF_ERROR(CheckPort("listen", address, ", or unix:/path"));
    if (!config.has_tls() && !config.allow_insecure_tcp()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "listen: \"", address,
          "\" is TCP without TLS; set tls, or allow_insecure_tcp (--allow-insecure-tcp)"));
    }
  }
  if (config.has_tls() &&
      (config.tls().certificate_file().empty() || config.tls().key_file().empty())) {
    return absl::InvalidArgumentError("tls: want both certificate_file and key_file");
  }
  return absl::OkStatus();
}

absl::Status CheckTables(const v1::ServerConfig& config) {
  if (!config.table_writers().empty() && !config.table_writes()) {
    return absl::InvalidArgumentError("table_writers: want table_writes, nobody may write");
  }
  for (const std::string& writer : config.table_writers()) {
    if (writer.empty() || (writer != "unix:" && config.tls().client_ca_file().empty())) {
      return absl::InvalidArgumentError(
          absl::StrCat("table_writers=\"", writer,
                       "\", want \"unix:\", or the name of a client certificate and "
                       "tls.client_ca_file, which asks for them"));
    }
  }
  if (config.require_signature() && config.trusted_key_files().empty()) {
    return absl::InvalidArgumentError(
        "require_signature: want trusted_key_files, nobody's signature would do");
  }
  const v1::ServerConfig::Shadow& shadow = config.shadow();
  // Not a number fails both comparisons.
  if (!(shadow.percent() >= 0 && shadow.percent() <= 100)) {
    return absl::InvalidArgumentError(
        absl::StrCat("shadow.percent=", shadow.percent(), ", want 0..100"));
  }
  const v1::TablePin& table = shadow.table();
  if (shadow.percent() > 0 && table.name().empty() && table.version().empty() &&
      table.digest().empty() && table.alias().empty()) {
    return absl::InvalidArgumentError(
        "shadow.table: empty, want which table is asked, for example { alias: \"canary\" }");
  }
  return absl::OkStatus();
}

void FillLimits(v1::ServerConfig::Limits& limits) {
  if (limits.max_inline_bytes() == 0) limits.set_max_inline_bytes(uint64_t{64} << 20);
  if (limits.max_table_bytes() == 0) limits.set_max_table_bytes(uint64_t{64} << 20);
  if (limits.queue_capacity() == 0) limits.set_queue_capacity(256);
  if (limits.stream_credits() == 0) limits.set_stream_credits(64);
  if (limits.max_seq_len() == 0) limits.set_max_seq_len(uint64_t{1} << 20);
  if (limits.max_layers() == 0) limits.set_max_layers(1024);
}

void FillMemory(v1::ServerConfig::Memory& memory) {
  if (memory.max_sessions() == 0) memory.set_max_sessions(256);
  if (memory.max_regions_per_session() == 0) memory.set_max_regions_per_session(1024);
  if (memory.max_region_bytes_per_session() == 0) {
    memory.set_max_region_bytes_per_session(uint64_t{1} << 40);
  }
  if (memory.lease_seconds() == 0) memory.set_lease_seconds(120);
  if (!memory.has_max_owned_bytes()) memory.set_max_owned_bytes(uint64_t{1} << 30);
  if (memory.max_owned_bytes_per_session() == 0) {
    memory.set_max_owned_bytes_per_session(
        std::max(memory.max_owned_bytes() / 4, kLeastOwnedBytes));
  }
  if (memory.quarantine_seconds() == 0) memory.set_quarantine_seconds(60);
}

void FillEtcd(v1::ServerConfig::Etcd& etcd) {
  if (etcd.prefix().empty()) etcd.set_prefix("/keepset");
  if (etcd.max_value_bytes() == 0) etcd.set_max_value_bytes(uint64_t{1} << 20);
  if (etcd.start_timeout_ms() == 0) etcd.set_start_timeout_ms(5000);
}

template <typename Value>
absl::Status CheckRange(absl::string_view field, Value value, Value low, Value high) {
  if (value < low || value > high) {
    return absl::InvalidArgumentError(absl::StrCat(field, "=", value, ", want ", low, "..", high));
  }
  return absl::OkStatus();
}

absl::Status CheckOwnedMemory(const v1::ServerConfig::Memory& memory) {
  const uint64_t bytes = memory.max_owned_bytes();
  if (bytes == 0) return absl::OkStatus();
  if (bytes < kLeastOwnedBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "memory.max_owned_bytes=", bytes, ", want 0 (none) or ", kLeastOwnedBytes, " or more"));
  }
  return CheckRange<uint64_t>("memory.max_owned_bytes_per_session",
                              memory.max_owned_bytes_per_session(), kLeastOwnedBytes, bytes);
}

}  // namespace

absl::string_view UnixPath(absl::string_view address) {
  if (!absl::ConsumePrefix(&address, "unix:")) return {};
  // "unix:///path" is the form with an authority.
  if (absl::StartsWith(address, "///")) address.remove_prefix(2);
  return address;
}

absl::StatusOr<v1::ServerConfig> ParseServerConfig(absl::string_view textproto,
                                                   absl::string_view label) {
  v1::ServerConfig config;
  ErrorCollector collector(label);
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&collector);
  if (!parser.ParseFromString(std::string(textproto), &config)) {
    return absl::InvalidArgumentError(absl::StrJoin(collector.errors(), "; "));
  }
  return config;
}

absl::StatusOr<v1::ServerConfig> ReadServerConfig(const std::string& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  // Not by iterators: they throw where reading fails, of a directory for example.
  std::string text;
  char buffer[4096];
  while (file.read(buffer, sizeof(buffer)), file.gcount() > 0) text.append(buffer, file.gcount());
  if (!file.is_open() || file.bad()) {
    const int error = errno;
    return absl::ErrnoToStatus(error == 0 ? EIO : error, absl::StrCat("config file ", path));
  }
  return ParseServerConfig(text, path);
}

absl::Status ResolveServerConfig(v1::ServerConfig& config) {
  if (config.listen().empty()) config.add_listen(std::string(kDefaultListen));
  if (config.metrics_listen().empty()) config.set_metrics_listen(std::string(kDefaultMetrics));
  if (config.socket_mode() == 0) config.set_socket_mode(0600);
  if (config.side_socket().empty()) {
    for (const std::string& address : config.listen()) {
      const absl::string_view path = UnixPath(address);
      if (path.empty()) continue;
      config.set_side_socket(absl::StrCat(path, ".fd"));
      break;
    }
  }
  FillLimits(*config.mutable_limits());
  FillMemory(*config.mutable_memory());
  if (config.has_etcd()) FillEtcd(*config.mutable_etcd());
  if (config.num_workers() == 0) config.set_num_workers(2);
  if (config.drain_timeout_ms() == 0) config.set_drain_timeout_ms(10000);
  if (config.log_format().empty()) config.set_log_format("text");
  if (config.backend().empty()) config.set_backend("cpu");

  KEEPSET_RETURN_IF_ERROR(CheckListen(config));
  KEEPSET_RETURN_IF_ERROR(CheckTables(config));
  if (config.metrics_listen() != "off") {
    KEEPSET_RETURN_IF_ERROR(CheckPort("metrics_listen", config.metrics_listen(), ", or off"));
  }
  if (!config.health_listen().empty()) {
    KEEPSET_RETURN_IF_ERROR(CheckPort("health_listen", config.health_listen()));
  }
  if (config.side_socket().size() > kMaxUnixPath) {
    return absl::InvalidArgumentError(absl::StrCat("side_socket: path of ",
                                                   config.side_socket().size(),
                                                   " bytes, want at most ", kMaxUnixPath));
  }
  if (config.log_format() != "text" && config.log_format() != "json") {
    return absl::InvalidArgumentError(
        absl::StrCat("log_format: \"", config.log_format(), "\", want text or json"));
  }
  const auto& limits = config.limits();
  KEEPSET_RETURN_IF_ERROR(CheckRange<uint32_t>("socket_mode", config.socket_mode(), 0, 0777));
  KEEPSET_RETURN_IF_ERROR(CheckRange<uint64_t>("limits.max_inline_bytes", limits.max_inline_bytes(),
                                               1024, uint64_t{1} << 30));
  KEEPSET_RETURN_IF_ERROR(CheckRange<uint64_t>("limits.max_table_bytes", limits.max_table_bytes(),
                                               1024, uint64_t{1} << 30));
  KEEPSET_RETURN_IF_ERROR(
      CheckRange<uint32_t>("limits.queue_capacity", limits.queue_capacity(), 1, 1 << 20));
  KEEPSET_RETURN_IF_ERROR(
      CheckRange<uint32_t>("limits.stream_credits", limits.stream_credits(), 1, 1 << 16));
  KEEPSET_RETURN_IF_ERROR(
      CheckRange<uint64_t>("limits.max_seq_len", limits.max_seq_len(), 1, uint64_t{1} << 24));
  KEEPSET_RETURN_IF_ERROR(
      CheckRange<uint32_t>("limits.max_layers", limits.max_layers(), 1, 1 << 16));
  if (config.has_etcd()) {
    if (config.etcd().endpoints().empty()) {
      return absl::InvalidArgumentError("etcd.endpoints: none, want at least one host:port");
    }
    KEEPSET_RETURN_IF_ERROR(CheckRange<uint64_t>(
        "etcd.max_value_bytes", config.etcd().max_value_bytes(), 1024, uint64_t{1} << 30));
    KEEPSET_RETURN_IF_ERROR(CheckRange<uint32_t>("etcd.start_timeout_ms",
                                                 config.etcd().start_timeout_ms(), 1, 600'000));
  }
  KEEPSET_RETURN_IF_ERROR(CheckRange<uint64_t>("device_memory_bytes", config.device_memory_bytes(),
                                               0, uint64_t{1} << 50));
  KEEPSET_RETURN_IF_ERROR(CheckRange<uint32_t>("num_workers", config.num_workers(), 1, 1024));
  KEEPSET_RETURN_IF_ERROR(CheckRange<uint32_t>("num_threads", config.num_threads(), 0, 4096));
  KEEPSET_RETURN_IF_ERROR(CheckOwnedMemory(config.memory()));
  KEEPSET_RETURN_IF_ERROR(CheckRange<uint32_t>("memory.quarantine_seconds",
                                               config.memory().quarantine_seconds(), 1, 86'400));
  return CheckRange<uint32_t>("memory.lease_seconds", config.memory().lease_seconds(), 3, 3600);
}

}  // namespace keepset::service
