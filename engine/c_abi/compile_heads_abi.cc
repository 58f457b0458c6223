// keepset.h: compiling observation_heads tables.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/c_abi/handles.h"
#include "tables/observation_compiler.h"
#include "tables/safetensors.h"

namespace {

using ::keepset::engine::CreatedAt;
using ::keepset::engine::Guard;
using ::keepset::engine::RequirePointer;
using ::keepset::engine::RequireStruct;
namespace tables = ::keepset::tables;

constexpr int32_t kMaxThreads = 1024;

absl::Status Assign(const int64_t* values, size_t count, absl::string_view name,
                    std::vector<int64_t>& out) {
  if (count == 0) return absl::OkStatus();
  KEEPSET_RETURN_IF_ERROR(RequirePointer(values, name));
  out.assign(values, values + count);
  return absl::OkStatus();
}

absl::StatusOr<tables::ObservationCompileOptions> ToOptions(
    const keepset_compile_heads_options& from) {
  KEEPSET_RETURN_IF_ERROR(RequirePointer(from.name, "name"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(from.version, "version"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(from.out_path, "out_path"));
  if (from.num_threads < 0 || from.num_threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat("num_threads=", from.num_threads, ", want 0..",
                                                   kMaxThreads, " (0: all cores)"));
  }
  tables::ObservationCompileOptions options;
  options.name = from.name;
  options.version = from.version;
  KEEPSET_RETURN_IF_ERROR(Assign(from.budgets, from.num_budgets, "budgets", options.budgets));
  KEEPSET_RETURN_IF_ERROR(
      Assign(from.pool_kernels, from.num_pool_kernels, "pool_kernels", options.pool_kernels));
  KEEPSET_RETURN_IF_ERROR(
      Assign(from.dilations, from.num_dilations, "dilations", options.dilations));
  if (from.max_heads != 0) options.max_heads = from.max_heads;
  options.num_heads = from.num_heads;
  if (from.num_folds != 0) options.num_folds = from.num_folds;
  if (from.default_budget != 0) options.default_budget = from.default_budget;
  options.num_threads = from.num_threads;
  options.created = CreatedAt(from.created_unix_seconds);
  options.tool_version = keepset_version();
  return options;
}

}  // namespace

extern "C" {

keepset_status keepset_table_compile_heads(const keepset_compile_heads_options* options,
                                           keepset_report** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(options, "options"));
    KEEPSET_RETURN_IF_ERROR(
        RequireStruct(options->struct_size, sizeof(*options), "keepset_compile_heads_options"));
    KEEPSET_ASSIGN_OR_RETURN(const tables::ObservationCompileOptions compile, ToOptions(*options));
    std::vector<std::string> paths;
    for (size_t i = 0; i < options->num_record_paths; ++i) {
      KEEPSET_RETURN_IF_ERROR(RequirePointer(options->record_paths, "record_paths"));
      KEEPSET_RETURN_IF_ERROR(
          RequirePointer(options->record_paths[i], absl::StrCat("record_paths[", i, "]")));
      paths.emplace_back(options->record_paths[i]);
    }
    tables::CompileProgress progress;
    if (options->progress != nullptr) {
      progress = [options](int64_t done, int64_t total) {
        options->progress(options->progress_user, done, total);
      };
    }
    auto report = std::make_unique<keepset_report>();
    KEEPSET_ASSIGN_OR_RETURN(tables::CompiledObservationHeads compiled,
                             tables::CompileObservationHeads(paths, compile, progress));
    KEEPSET_ASSIGN_OR_RETURN(const std::string bytes, tables::SerializeTable(compiled.content));
    KEEPSET_RETURN_IF_ERROR(tables::WriteFileAtomically(options->out_path, bytes));
    report->json = std::move(compiled.report_json);
    if (out != nullptr) *out = report.release();
    return absl::OkStatus();
  });
}

}  // extern "C"
