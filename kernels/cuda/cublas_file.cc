#include "kernels/cuda/cublas_file.h"

#include <dlfcn.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::kernels::cuda {
namespace {

std::string LinkerError() {
  const char* const error = dlerror();
  return error != nullptr ? error : "no reason given";
}

}  // namespace

std::vector<std::string> CublasFile::Names(const std::string& path) {
  if (!path.empty()) return {path};
  return {"libcublas.so.13", "libcublas.so.12"};
}

absl::StatusOr<CublasFile> CublasFile::Load(absl::Span<const std::string> names) {
  std::vector<std::string> errors;
  for (const std::string& name : names) {
    void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library != nullptr) return CublasFile(name, library);
    errors.push_back(LinkerError());
  }
  return absl::FailedPreconditionError(
      absl::StrCat(absl::StrJoin(errors, "; "),
                   ": want cuBLAS 12 or 13 where the dynamic linker looks (LD_LIBRARY_PATH)"));
}

absl::StatusOr<void*> CublasFile::FindSymbol(const char* symbol) const {
  void* const found = dlsym(library_, symbol);
  if (found != nullptr) return found;
  return absl::FailedPreconditionError(
      absl::StrCat(name_, ": no ", symbol, ", want cuBLAS 12 or 13"));
}

}  // namespace keepset::kernels::cuda
