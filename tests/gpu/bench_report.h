// What the parts of gpu_bench say and how they sum up times. Needs no device.
#ifndef KEEPSET_TESTS_GPU_BENCH_REPORT_H_
#define KEEPSET_TESTS_GPU_BENCH_REPORT_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace keepset::gpu {

// The smallest value that `share` of the values do not exceed; values: at least one.
double Quantile(std::vector<double> values, double share);

// Adds `<name>`, the median, and `<name>_p99` to a line.
void AddTimes(const std::string& name, const std::vector<double>& times,
              nlohmann::ordered_json* line);

// By the host's clock.
double HostMilliseconds(const std::function<void()>& work);
// The same after warm-ups, so many times.
std::vector<double> RepeatHostMilliseconds(int repetitions, const std::function<void()>& work);

// Which kernels computed window scores, by the backend's name of a result: "portable", "hopper", or
// "mixed", of which neither may boast.
std::string WindowPath(absl::string_view computed_by);

// One JSON line on stdout, and a row of the table on stderr.
void Report(const nlohmann::ordered_json& line);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_BENCH_REPORT_H_
