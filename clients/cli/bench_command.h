// The two benchmarks of `keepset bench`; both print one JSON object per line.
#ifndef KEEPSET_CLIENTS_CLI_BENCH_COMMAND_H_
#define KEEPSET_CLIENTS_CLI_BENCH_COMMAND_H_

#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "clients/cli/console.h"

namespace keepset::cli {

absl::Status RunBenchEngine(absl::Span<const std::string> arguments, Console& console);
absl::Status RunBenchService(absl::Span<const std::string> arguments, Console& console);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_BENCH_COMMAND_H_
