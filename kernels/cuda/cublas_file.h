// libcublas as the dynamic linker finds it. Never linked, half a gigabyte with what it needs, and
// loaded by those alone who ask for it: window kernels "cublas", and the benchmark's ceilings.
#ifndef KEEPSET_KERNELS_CUDA_CUBLAS_FILE_H_
#define KEEPSET_KERNELS_CUDA_CUBLAS_FILE_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace keepset::kernels::cuda {

// Stays loaded until the process ends: the library has threads and exit handlers of its own.
class CublasFile {
 public:
  // path: a file; empty: libcublas.so.13, then libcublas.so.12, where the linker looks.
  // FailedPrecondition with the linker's reason when there is none.
  static absl::StatusOr<CublasFile> Load(const std::string& path);

  // What was loaded, as it was asked for.
  const std::string& name() const { return name_; }

  // *function = the library's `symbol`; FailedPrecondition where it has none.
  template <typename Function>
  absl::Status Find(const char* symbol, Function** function) const {
    absl::StatusOr<void*> found = FindSymbol(symbol);
    if (!found.ok()) return found.status();
    *function = reinterpret_cast<Function*>(*found);
    return absl::OkStatus();
  }

 private:
  CublasFile(std::string name, void* library) : name_(std::move(name)), library_(library) {}

  absl::StatusOr<void*> FindSymbol(const char* symbol) const;

  std::string name_;
  void* library_;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CUBLAS_FILE_H_
