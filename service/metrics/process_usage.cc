#include "service/metrics/process_usage.h"

#include <dirent.h>
#include <sys/resource.h>

#include <fstream>
#include <limits>
#include <string>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace keepset::service {
namespace {

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

double SoftLimit(int resource) {
  rlimit limit = {};
  if (getrlimit(resource, &limit) != 0) return kUnknown;
  if (limit.rlim_cur == RLIM_INFINITY) return std::numeric_limits<double>::infinity();
  return static_cast<double>(limit.rlim_cur);
}

double OpenFds() {
  DIR* dir = opendir("/proc/self/fd");
  if (dir == nullptr) return kUnknown;
  const absl::Cleanup close_dir = [dir] { closedir(dir); };
  double entries = 0;
  while (readdir(dir) != nullptr) ++entries;
  return entries - 3;  // ".", ".." and the descriptor of this very directory
}

double MemoryMappings() {
  std::ifstream maps("/proc/self/maps");
  if (!maps) return kUnknown;
  double lines = 0;
  for (std::string line; std::getline(maps, line);) ++lines;
  return lines;
}

double MaxMemoryMappings() {
  std::ifstream file("/proc/sys/vm/max_map_count");
  double value = kUnknown;
  return file >> value ? value : kUnknown;
}

}  // namespace

ProcessUsage ReadProcessUsage() {
  ProcessUsage usage;
  usage.open_fds = OpenFds();
  usage.max_fds = SoftLimit(RLIMIT_NOFILE);
  usage.memory_mappings = MemoryMappings();
  usage.max_memory_mappings = MaxMemoryMappings();
  usage.max_locked_bytes = SoftLimit(RLIMIT_MEMLOCK);
  usage.locked_bytes = kUnknown;
  usage.resident_bytes = kUnknown;
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    absl::string_view rest = line;
    double* field = nullptr;
    if (absl::ConsumePrefix(&rest, "VmLck:")) field = &usage.locked_bytes;
    if (absl::ConsumePrefix(&rest, "VmRSS:")) field = &usage.resident_bytes;
    int64_t kibibytes = 0;
    if (field != nullptr && absl::ConsumeSuffix(&rest, " kB") &&
        absl::SimpleAtoi(rest, &kibibytes)) {
      *field = static_cast<double>(kibibytes) * 1024;
    }
  }
  return usage;
}

}  // namespace keepset::service
