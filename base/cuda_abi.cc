#include "base/cuda_abi.h"

#include <dlfcn.h>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"

namespace keepset::cuda_abi {
namespace {

// Never closed: the driver keeps threads of its own.
absl::StatusOr<void*> Open(const std::string& library) {
  void* const handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle != nullptr) return handle;
  const char* const error = ::dlerror();
  return absl::NotFoundError(
      absl::StrCat("no CUDA driver: ", error == nullptr ? library : std::string(error)));
}

template <typename Entry>
absl::Status Find(void* handle, const std::string& library, const char* symbol, Entry& entry) {
  entry = reinterpret_cast<Entry>(::dlsym(handle, symbol));
  if (entry != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(library, ": no entry point ", symbol, ", the driver is too old"));
}

}  // namespace

std::string UuidText(const Uuid& uuid) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string text = "GPU-";
  for (size_t i = 0; i < sizeof(uuid.bytes); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kHex[uuid.bytes[i] >> 4];
    text += kHex[uuid.bytes[i] & 15];
  }
  return text;
}

bool IsSameDevice(absl::string_view uuid, absl::string_view other) {
  for (absl::string_view* const text : {&uuid, &other}) {
    if (!absl::ConsumePrefix(text, "GPU-")) absl::ConsumePrefix(text, "MIG-");
  }
  return absl::EqualsIgnoreCase(uuid, other);
}

#define KEEPSET_CUDA_FIND(member, symbol, parameters) \
  KEEPSET_RETURN_IF_ERROR(Find(handle, library, symbol, api.member));

absl::StatusOr<ImportApi> LoadImportApi(const std::string& library) {
  KEEPSET_ASSIGN_OR_RETURN(void* const handle, Open(library));
  ImportApi api;
  KEEPSET_CUDA_IMPORT_ENTRIES(KEEPSET_CUDA_FIND)
  return api;
}

absl::StatusOr<ExportApi> LoadExportApi(const std::string& library) {
  KEEPSET_ASSIGN_OR_RETURN(void* const handle, Open(library));
  ExportApi api;
  KEEPSET_CUDA_EXPORT_ENTRIES(KEEPSET_CUDA_FIND)
  return api;
}

absl::StatusOr<AllocateApi> LoadAllocateApi(const std::string& library) {
  KEEPSET_ASSIGN_OR_RETURN(void* const handle, Open(library));
  AllocateApi api;
  KEEPSET_CUDA_ALLOCATE_ENTRIES(KEEPSET_CUDA_FIND)
  return api;
}

#undef KEEPSET_CUDA_FIND

}  // namespace keepset::cuda_abi
