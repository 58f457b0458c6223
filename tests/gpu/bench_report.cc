#include "tests/gpu/bench_report.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace keepset::gpu {

double Quantile(std::vector<double> values, double share) {
  KEEPSET_CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(share * static_cast<double>(values.size()));
  return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
}

void AddTimes(const std::string& name, const std::vector<double>& times,
              nlohmann::ordered_json* line) {
  (*line)[name] = Quantile(times, 0.5);
  (*line)[absl::StrCat(name, "_p99")] = Quantile(times, 0.99);
}

double HostMilliseconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

std::vector<double> RepeatHostMilliseconds(int repetitions, const std::function<void()>& work) {
  constexpr int kWarmUps = 5;
  for (int i = 0; i < kWarmUps; ++i) work();
  std::vector<double> times;
  for (int i = 0; i < repetitions; ++i) times.push_back(HostMilliseconds(work));
  return times;
}

std::string WindowPath(absl::string_view computed_by) {
  if (absl::EndsWith(computed_by, "/wgmma")) return "hopper";
  if (absl::EndsWith(computed_by, "/cublas")) return "cublas";
  return absl::StrContains(computed_by, "wgmma") ? "mixed" : "portable";
}

void Report(const nlohmann::ordered_json& line) {
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
  std::string row;
  for (const auto& [key, value] : line.items()) {
    absl::StrAppend(&row, row.empty() ? "" : "  ", key == "bench" ? "" : absl::StrCat(key, "="),
                    value.is_string()         ? value.get<std::string>()
                    : value.is_number_float() ? absl::StrFormat("%.4g", value.get<double>())
                                              : value.dump());
  }
  std::fprintf(stderr, "%s\n", row.c_str());
}

}  // namespace keepset::gpu
