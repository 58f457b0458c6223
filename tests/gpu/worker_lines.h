// How a worker process of these tests tells its parent where it is.
#ifndef KEEPSET_TESTS_GPU_WORKER_LINES_H_
#define KEEPSET_TESTS_GPU_WORKER_LINES_H_

#include <unistd.h>

#include <iostream>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace keepset::gpu {

inline void Say(const std::string& line) { std::cout << line << std::endl; }

[[noreturn]] inline void StandStill(const std::string& line) {
  Say(line);
  while (true) ::pause();
}

// The exit status of a worker that ends so, which it says when it is an error.
inline int ExitStatus(const absl::Status& status) {
  if (!status.ok()) Say(absl::StrCat("failed: ", status.ToString()));
  return status.ok() ? 0 : 1;
}

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_WORKER_LINES_H_
