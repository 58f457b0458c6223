#include "kernels/backend_registry.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::kernels {

#define KEEPSET_BACKEND(name, factory) \
  absl::StatusOr<std::unique_ptr<ComputeBackend>> factory(const BackendOptions& options);
#include "kernels/backends.def"
#undef KEEPSET_BACKEND

std::vector<std::string> ListBackends() {
  return {
#define KEEPSET_BACKEND(name, factory) #name,
#include "kernels/backends.def"
#undef KEEPSET_BACKEND
  };
}

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewBackend(absl::string_view name,
                                                           const BackendOptions& options) {
#define KEEPSET_BACKEND(listed_name, factory) \
  if (name == #listed_name) return factory(options);
#include "kernels/backends.def"
#undef KEEPSET_BACKEND
  return absl::NotFoundError(absl::StrCat(
      "backend \"", name, "\" is not listed, want one of: ", absl::StrJoin(ListBackends(), ", ")));
}

}  // namespace keepset::kernels
