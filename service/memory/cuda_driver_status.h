// What an error of the CUDA driver means to whoever can mend it.
#ifndef KEEPSET_SERVICE_MEMORY_CUDA_DRIVER_STATUS_H_
#define KEEPSET_SERVICE_MEMORY_CUDA_DRIVER_STATUS_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/cuda_abi.h"

namespace keepset::service {

// Whose memory the failed call was about.
enum class MemoryOf {
  kAnother,  // mapped from another process
  kOurs,     // made here for another process
};

// `text` with what to change where the caller or the host's setup is to blame; the rest (a faulty
// device, calls out of order) is Internal. result: not kSuccess.
absl::Status DriverError(cuda_abi::Result result, absl::string_view text, MemoryOf memory);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_CUDA_DRIVER_STATUS_H_
