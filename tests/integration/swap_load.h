// Load on a server whose active table is changed all the while: many streams compress one prompt,
// one client activates versions and rolls back. Says whether every answer was whole, and how long
// answers took with and without changes.
#ifndef KEEPSET_TESTS_INTEGRATION_SWAP_LOAD_H_
#define KEEPSET_TESTS_INTEGRATION_SWAP_LOAD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tests/fakes/synthetic_prompt.h"
#include "tests/integration/table_answers.h"

namespace keepset::integration {

// The versions of one table that take turns, named "live".
std::vector<AnsweringTable> SwapLoadTables(const fakes::SyntheticPrompt& prompt);

struct SwapLoadOptions {
  std::string address;  // of a server that has every version loaded and takes writes
  int num_streams = 32;
  int num_swaps = 200;
  // Operations between two swaps: each version really answers.
  int operations_per_swap = 64;
  // Operations without swaps, half of them before and half after.
  int quiet_operations = 12800;
};

struct LatencyStats {
  int64_t operations = 0;
  absl::Duration p50;
  absl::Duration p99;
};

struct SwapLoadReport {
  int64_t activations = 0;
  int64_t rollbacks = 0;
  int64_t failed = 0;
  int64_t mixed = 0;
  std::string first_complaint;
  LatencyStats quiet;       // no swap was under way
  LatencyStats swapping;    // begun between the first and the last swap
  absl::Duration swap_p50;  // of Activate and Rollback themselves
  absl::Duration swap_p99;
};

// `tables` are those of SwapLoadTables, one of them is active. An error of a swap ends the run and
// is returned.
absl::StatusOr<SwapLoadReport> RunSwapLoad(const SwapLoadOptions& options,
                                           const fakes::SyntheticPrompt& prompt,
                                           const std::vector<AnsweringTable>& tables);

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_SWAP_LOAD_H_
