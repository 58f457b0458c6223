// Flags of `keepset compress`.
#ifndef KEEPSET_CLIENTS_CLI_COMPRESS_OPTIONS_H_
#define KEEPSET_CLIENTS_CLI_COMPRESS_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "clients/cli/server_connection.h"
#include "clients/cpp/client.h"

namespace keepset::cli {

struct CompressOptions {
  std::string capture;
  std::string policy;
  std::vector<std::pair<std::string, std::string>> parameters;
  std::optional<std::string> table;
  std::optional<int64_t> budget;
  std::optional<double> kept_fraction;
  std::optional<int64_t> budget_bytes;
  std::optional<std::string> scope;
  int64_t protect_sink = 0;
  int64_t protect_window = 0;
  std::vector<std::string> protect_spans;
  std::optional<std::string> observe_span;
  std::optional<double> ppl;
  bool shadow = false;
  ServerFlags server;
  client::Transport transport = client::Transport::kAuto;
  client::TablePin pin;
  std::optional<client::TablePin> shadow_table;
  bool gather = false;
  int64_t threads = 0;
  bool json = false;
  std::string out;
};

std::string CompressHelp();

// Usage errors for everything that can be told without opening a file or a connection.
absl::StatusOr<CompressOptions> ParseCompressOptions(absl::Span<const std::string> arguments);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_COMPRESS_OPTIONS_H_
