// The compute backends of this build, listed in backends.def.
#ifndef KEEPSET_KERNELS_BACKEND_REGISTRY_H_
#define KEEPSET_KERNELS_BACKEND_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/compute_backend.h"

namespace keepset::kernels {

struct BackendOptions {
  int num_threads = 0;  // CPU worker threads of one op; 0 = all cores this process may use
  // Window scores of the GPU: "portable" (also when empty), "hopper": TMA and wgmma, sm_90 only,
  // refused elsewhere, or "cublas": products by cuBLAS, refused where it cannot be loaded. Other
  // backends want it empty.
  std::string window_kernels = {};
  // The file of cuBLAS; empty: by its name, where the dynamic linker looks.
  std::string cublas_library = {};
  // Device memory of a GPU's ops and score buffers, at least 512 KiB, with window_kernels
  // "cublas" 4.5 MiB. Not 0: it is allocated when the backend is made, or is device_memory, and no
  // more is ever allocated but by cuBLAS for its handle and kernels; an op that finds no room ends
  // with ResourceExhausted. 0: it grows as ops need it. Page-locked host memory grows anyway. Other
  // backends want 0.
  int64_t device_memory_bytes = 0;
  // So many bytes of the backend's device, at a multiple of 256, that stay the caller's and outlive
  // the backend; nullptr: the backend's own.
  void* device_memory = nullptr;
};

// Names as listed in backends.def, in that order.
std::vector<std::string> ListBackends();

// NotFound for a name that is not listed (the message lists them); FailedPrecondition when the
// backend is built but its device is absent.
absl::StatusOr<std::unique_ptr<ComputeBackend>> NewBackend(absl::string_view name,
                                                           const BackendOptions& options);

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_BACKEND_REGISTRY_H_
