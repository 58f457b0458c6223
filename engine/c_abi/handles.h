// What the opaque types of keepset.h hold, and how a Status crosses the C boundary.
#ifndef KEEPSET_ENGINE_C_ABI_HANDLES_H_
#define KEEPSET_ENGINE_C_ABI_HANDLES_H_

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "engine/keepset.h"
#include "engine/operation.h"
#include "engine/policies/policy_registry.h"
#include "kernels/compute_backend.h"
#include "kernels/views.h"
#include "tables/capture_file.h"
#include "tables/decision_table.h"

struct keepset_engine {
  std::unique_ptr<keepset::kernels::ComputeBackend> backend;
  std::unique_ptr<keepset::engine::PolicyRegistry> policies;
  int num_threads = 0;
  std::string backend_name;
  std::string policy_names;
};

struct keepset_table {
  std::shared_ptr<const keepset::tables::DecisionTable> table;
  std::string kind;
  std::string inspection;
  std::string difference;
  std::string comparison;
};

struct keepset_result {
  const keepset::engine::OperationResult* result = nullptr;
  std::string json;
};

struct keepset_operation {
  std::unique_ptr<keepset::engine::Operation> operation;
  const keepset::kernels::ComputeBackend* backend = nullptr;  // the engine's
  keepset_result result;
  std::string superseded_json;  // of a result that was taken back: callers may still read it
};

struct keepset_capture {
  std::unique_ptr<keepset::tables::CaptureFile> file;
  std::string model_json;
};

struct keepset_report {
  std::string json;
};

namespace keepset::engine {

// Records this thread's last error and returns its code.
keepset_status ReportStatus(const absl::Status& status);

// What came of `call`, a callable returning absl::Status. What libraries throw (no memory, above
// all) must not cross into C.
template <typename Call>
absl::Status StatusOf(const Call& call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory");
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
}

// Runs `call` and reports what came of it.
template <typename Call>
keepset_status Guard(const Call& call) {
  return ReportStatus(StatusOf(call));
}

// keepset_operation_spec of the first callers ends here.
inline constexpr size_t kLeastSpecBytes = offsetof(keepset_operation_spec, cuda_stream);

// InvalidArgument naming the argument that is NULL.
absl::Status RequirePointer(const void* pointer, absl::string_view name);
// InvalidArgument when a caller's struct is older than the first version or was not initialised.
absl::Status RequireStruct(size_t struct_size, size_t least, absl::string_view name);

// When a table is said to have been compiled; 0: now.
inline absl::Time CreatedAt(int64_t unix_seconds) {
  return unix_seconds == 0 ? SystemClock().Now() : absl::FromUnixSeconds(unix_seconds);
}

// `what` prefixes messages, for example "layer 3: k". An absent view (data NULL) converts to one.
absl::StatusOr<kernels::DType> ToDType(int32_t dtype, absl::string_view what);
absl::StatusOr<kernels::KvView> ToKvView(const keepset_kv_view& view, absl::string_view what);
absl::StatusOr<kernels::MutableKvView> ToMutableKvView(const keepset_kv_view& view,
                                                       absl::string_view what);
absl::StatusOr<LayerObservation> ToObservation(const keepset_layer_observation& observation,
                                               int64_t layer);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_C_ABI_HANDLES_H_
