// keepset.h: compiling tables.
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/c_abi/handles.h"
#include "tables/safetensors.h"
#include "tables/table_compiler.h"
#include "tables/table_file.h"

namespace {

using ::keepset::engine::CreatedAt;
using ::keepset::engine::Guard;
using ::keepset::engine::RequirePointer;
using ::keepset::engine::RequireStruct;
namespace tables = ::keepset::tables;

constexpr int32_t kMaxThreads = 1024;

absl::Status CheckStruct(const keepset_compile_options* options) {
  KEEPSET_RETURN_IF_ERROR(RequirePointer(options, "options"));
  KEEPSET_RETURN_IF_ERROR(
      RequireStruct(options->struct_size, sizeof(*options), "keepset_compile_options"));
  if (options->num_threads < 0 || options->num_threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat("num_threads=", options->num_threads,
                                                   ", want 0..", kMaxThreads, " (0: all cores)"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> RecordPaths(const keepset_compile_options& options) {
  if (options.num_record_paths == 0) {
    return absl::InvalidArgumentError("num_record_paths=0, want at least 1");
  }
  KEEPSET_RETURN_IF_ERROR(RequirePointer(options.record_paths, "record_paths"));
  std::vector<std::string> paths;
  for (size_t i = 0; i < options.num_record_paths; ++i) {
    KEEPSET_RETURN_IF_ERROR(
        RequirePointer(options.record_paths[i], absl::StrCat("record_paths[", i, "]")));
    paths.emplace_back(options.record_paths[i]);
  }
  return paths;
}

tables::BinCounts Bins(const keepset_compile_options& options) {
  tables::BinCounts bins;
  if (options.entropy_bins != 0) bins.entropy = options.entropy_bins;
  if (options.ppl_bins != 0) bins.ppl = options.ppl_bins;
  return bins;
}

tables::ActionGrids Actions(const keepset_compile_options& options) {
  tables::ActionGrids actions;
  const auto set = [](const keepset_action_grid& from, tables::ActionGrid& to) {
    if (from.count != 0) to = {from.first, from.step, from.count};
  };
  set(options.head_actions, actions.head);
  set(options.gate_actions, actions.gate);
  return actions;
}

tables::RecordProgress Progress(const keepset_compile_options& options) {
  if (options.progress == nullptr) return nullptr;
  return [progress = options.progress, user = options.progress_user](
             int64_t bytes_done, int64_t bytes_total) { progress(user, bytes_done, bytes_total); };
}

absl::StatusOr<tables::TableSolver> Solver(const char* name) {
  const std::string solver = name == nullptr ? "exact" : name;
  if (solver == "exact") return tables::TableSolver::kExact;
  if (solver == "adam") return tables::TableSolver::kAdam;
  return absl::InvalidArgumentError(absl::StrCat("solver=", solver, ", want exact or adam"));
}

absl::StatusOr<tables::CompileOptions> CompileOptions(const keepset_compile_options& options) {
  KEEPSET_RETURN_IF_ERROR(RequirePointer(options.model_json, "model_json"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(options.name, "name"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(options.version, "version"));
  KEEPSET_RETURN_IF_ERROR(RequirePointer(options.out_path, "out_path"));
  tables::CompileOptions compile;
  compile.name = options.name;
  compile.version = options.version;
  KEEPSET_ASSIGN_OR_RETURN(compile.model,
                           tables::ParseModelFingerprint(options.model_json, "model"));
  KEEPSET_ASSIGN_OR_RETURN(compile.solver, Solver(options.solver));
  if (options.compare_solvers != 0) compile.comparison = tables::SolverComparison::kCompare;
  if (!std::isnan(options.conservative_weight)) {
    compile.conservative_weight = options.conservative_weight;
  }
  compile.bins = Bins(options);
  compile.actions = Actions(options);
  if (options.independent_records != 0) {
    compile.paired_policy = tables::PairedPolicyRule::kOptional;
  }
  if (options.default_budget != 0) compile.default_budget = options.default_budget;
  compile.limits.max_rejected = options.max_rejected;
  compile.num_threads = options.num_threads;
  compile.created = CreatedAt(options.created_unix_seconds);
  compile.tool_version = keepset_version();
  return compile;
}

}  // namespace

extern "C" {

const char* keepset_report_json(const keepset_report* report) { return report->json.c_str(); }
void keepset_report_destroy(keepset_report* report) { delete report; }

keepset_status keepset_table_compile(const keepset_compile_options* options, keepset_report** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(CheckStruct(options));
    KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> paths, RecordPaths(*options));
    KEEPSET_ASSIGN_OR_RETURN(const tables::CompileOptions compile, CompileOptions(*options));
    auto report = std::make_unique<keepset_report>();
    KEEPSET_ASSIGN_OR_RETURN(tables::CompiledTable table,
                             tables::CompileTable(paths, compile, Progress(*options)));
    KEEPSET_ASSIGN_OR_RETURN(const std::string bytes, tables::SerializeTable(table.content));
    KEEPSET_RETURN_IF_ERROR(tables::WriteFileAtomically(options->out_path, bytes));
    report->json = std::move(table.report_json);
    if (out != nullptr) *out = report.release();
    return absl::OkStatus();
  });
}

keepset_status keepset_records_summarize(const keepset_compile_options* options,
                                         keepset_report** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(CheckStruct(options));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> paths, RecordPaths(*options));
    auto report = std::make_unique<keepset_report>();
    KEEPSET_ASSIGN_OR_RETURN(report->json,
                             tables::SummarizeRecords(paths, Bins(*options), Actions(*options),
                                                      options->num_threads, Progress(*options)));
    *out = report.release();
    return absl::OkStatus();
  });
}

}  // extern "C"
