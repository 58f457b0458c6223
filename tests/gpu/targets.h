// Which of the figures that the project sets itself a run reaches. A target without a figure is
// "not yet measured", whatever else the run says; nothing here computes or estimates a figure.
#ifndef KEEPSET_TESTS_GPU_TARGETS_H_
#define KEEPSET_TESTS_GPU_TARGETS_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "nlohmann/json.hpp"

namespace keepset::gpu {

inline constexpr absl::string_view kReached = "reached";
inline constexpr absl::string_view kNotReached = "not reached";
inline constexpr absl::string_view kNotMeasured = "not yet measured";
// Of figures that are to be stated, without a goal for their size.
inline constexpr absl::string_view kMeasured = "measured";

struct Verdict {
  std::string target;              // what is measured
  std::string goal;                // "<= 25 us"
  std::optional<double> measured;  // in the goal's unit; nothing exactly when not yet measured
  absl::string_view verdict;       // one of the above
  std::string note;                // why there is no figure, or what to know of it
};

// lines: of gpu_bench, gpu_bench service, peers.py and run-gpu-checks.sh. One verdict per target,
// always the same ones in the same order. Of several lines that a target is about the worst counts.
std::vector<Verdict> JudgeTargets(absl::Span<const nlohmann::json> lines);

// Judges bench.jsonl, service.jsonl, peers.jsonl and checks.jsonl of a directory, those that are
// there, and prints every verdict as a JSON line on stdout and the table on stderr. Returns the
// program's exit code: 0, or 2 for bad usage.
int RunTargets(absl::Span<const char* const> arguments);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_TARGETS_H_
