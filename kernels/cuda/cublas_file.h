// libcublas as the dynamic linker finds it. Never linked, half a gigabyte with what it needs, and
// loaded by those alone who ask for it: window kernels "cublas", and the benchmark's ceilings.
#ifndef KEEPSET_KERNELS_CUDA_CUBLAS_FILE_H_
#define KEEPSET_KERNELS_CUDA_CUBLAS_FILE_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace keepset::kernels::cuda {

// Stays loaded until the process ends: the library has threads and exit handlers of its own.
class CublasFile {
 public:
  // Files to try in this order: `path`; empty: libcublas.so.13 and libcublas.so.12, where the
  // linker looks.
  static std::vector<std::string> Names(const std::string& path);
  // The first of them that loads. FailedPrecondition with the linker's reasons when none does.
  static absl::StatusOr<CublasFile> Load(absl::Span<const std::string> names);

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
