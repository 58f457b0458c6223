// keepset.h: versions, errors, engines.
#include <cstddef>
#include <memory>
#include <string>

#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "engine/c_abi/handles.h"
#include "kernels/backend_registry.h"
#include "kernels/fma_peak.h"

namespace keepset::engine {
namespace {

// errno's counterpart: a C caller asks for the message of its own thread's last call.
std::string& LastError() {
  thread_local std::string message;
  return message;
}

}  // namespace

keepset_status ReportStatus(const absl::Status& status) {
  LastError().assign(status.message().data(), status.message().size());
  return static_cast<keepset_status>(status.code());
}

absl::Status RequirePointer(const void* pointer, absl::string_view name) {
  if (pointer != nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is NULL"));
}

absl::Status RequireStruct(size_t struct_size, size_t least, absl::string_view name) {
  if (struct_size >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ".struct_size=", struct_size,
                                                 ", want sizeof(", name, "), at least ", least));
}

}  // namespace keepset::engine

using ::keepset::engine::Guard;
using ::keepset::engine::RequirePointer;
using ::keepset::engine::RequireStruct;

extern "C" {

int keepset_abi_version(void) { return KEEPSET_ABI_VERSION; }

const char* keepset_version(void) { return KEEPSET_VERSION_STRING; }

const char* keepset_last_error(void) { return keepset::engine::LastError().c_str(); }

keepset_status keepset_engine_create(const keepset_engine_options* options, keepset_engine** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    std::string name = "cpu";
    keepset::kernels::BackendOptions backend_options;
    if (options != nullptr) {
      KEEPSET_RETURN_IF_ERROR(RequireStruct(options->struct_size,
                                            offsetof(keepset_engine_options, window_kernels),
                                            "keepset_engine_options"));
      if (options->backend != nullptr) name = options->backend;
      if (options->num_threads < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("num_threads=", options->num_threads, ", want 0 (all cores) or more"));
      }
      backend_options.num_threads = options->num_threads;
      if (options->struct_size >= offsetof(keepset_engine_options, device_memory_bytes) &&
          options->window_kernels != nullptr) {
        backend_options.window_kernels = options->window_kernels;
      }
      if (options->struct_size >= sizeof(*options)) {
        backend_options.device_memory_bytes = options->device_memory_bytes;
        backend_options.device_memory = options->device_memory;
      }
    }
    auto engine = std::make_unique<keepset_engine>();
    KEEPSET_ASSIGN_OR_RETURN(engine->backend, keepset::kernels::NewBackend(name, backend_options));
    engine->policies = keepset::engine::NewBuiltinPolicyRegistry();
    engine->num_threads = backend_options.num_threads;
    engine->backend_name = engine->backend->name();
    engine->policy_names = absl::StrJoin(engine->policies->Names(), "\n");
    *out = engine.release();
    return absl::OkStatus();
  });
}

void keepset_engine_destroy(keepset_engine* engine) { delete engine; }

const char* keepset_engine_backend(const keepset_engine* engine) {
  return engine->backend_name.c_str();
}

const char* keepset_engine_policies(const keepset_engine* engine) {
  return engine->policy_names.c_str();
}

keepset_status keepset_engine_measure_peak(keepset_engine* engine, double* out_gflops) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(engine, "engine"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out_gflops, "out_gflops"));
    if (engine->backend_name.rfind("cpu", 0) != 0) {
      return absl::UnimplementedError(
          absl::StrCat("backend ", engine->backend_name, " has no measured multiply-add peak"));
    }
    *out_gflops = keepset::kernels::MeasureFmaPeakGflops(engine->num_threads);
    return absl::OkStatus();
  });
}

}  // extern "C"
