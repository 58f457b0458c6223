// Programs of the two-process tests: this one as a worker, and the server beside it.
#ifndef KEEPSET_TESTS_GPU_IPC_PROCESS_H_
#define KEEPSET_TESTS_GPU_IPC_PROCESS_H_

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/ipc_worker.h"
#include "tests/integration/child_process.h"
#include "tests/integration/eventually.h"

namespace keepset::gpu {

inline std::string Environment(const char* name, const std::string& otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

// With a launcher /proc/self/exe is the launcher.
inline std::string Program() {
  return Environment("KEEPSET_IPC_TEST", std::filesystem::read_symlink("/proc/self/exe"));
}

inline std::unique_ptr<integration::ChildProcess> NewProcess(
    const std::vector<std::string>& words, integration::ChildProcess::Output output) {
  std::vector<std::string> all =
      absl::StrSplit(Environment("KEEPSET_LAUNCHER", ""), ' ', absl::SkipEmpty());
  all.insert(all.end(), words.begin(), words.end());
  return std::make_unique<integration::ChildProcess>(all, output);
}

inline std::unique_ptr<integration::ChildProcess> NewWorker(const std::string& address,
                                                            const std::string& kind,
                                                            const std::string& phase) {
  return NewProcess({Program(), "--worker", address, kind, phase},
                    integration::ChildProcess::Output::kStdout);
}

// Whether `before` bytes are free again, soon.
inline bool IsBack(const Driver& driver, int64_t before) {
  return integration::Eventually([&] { return driver.FreeBytes() >= before - kSlackBytes; });
}
// Whether a region is taken of `before`.
inline bool IsTaken(const Driver& driver, int64_t before) {
  return driver.FreeBytes() <= before - kRegionBytes + kSlackBytes;
}

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_IPC_PROCESS_H_
