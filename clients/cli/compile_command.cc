// keepset tables compile | records.
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "clients/cli/compile_heads_command.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/new_table.h"
#include "clients/cli/record_flags.h"
#include "engine/keepset.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

void ShowReading(void* progress, int64_t bytes_done, int64_t bytes_total) {
  constexpr double kMiB = 1 << 20;
  static_cast<Progress*>(progress)->Show(
      absl::StrFormat("reading records: %.0f of %.0f MiB", bytes_done / kMiB, bytes_total / kMiB));
}

absl::Status ParseActions(absl::string_view flag, const std::optional<std::string>& text,
                          keepset_action_grid& out) {
  if (!text.has_value()) return absl::OkStatus();
  const std::vector<absl::string_view> parts = absl::StrSplit(*text, ':');
  if (parts.size() != 3 || !absl::SimpleAtod(parts[0], &out.first) ||
      !absl::SimpleAtod(parts[1], &out.step) || !absl::SimpleAtoi(parts[2], &out.count) ||
      out.count < 1) {
    return UsageError(
        absl::StrCat(flag, "=", *text, ", want FIRST:STEP:COUNT, such as 0.8:0.025:29"));
  }
  return absl::OkStatus();
}

// Flags of everything that reads records.
struct RecordFlags {
  std::optional<int64_t> entropy_bins;
  std::optional<int64_t> ppl_bins;
  ThreadsFlag threads;
  std::optional<std::string> head_actions;
  std::optional<std::string> gate_actions;

  void AddTo(FlagParser& parser) {
    parser.Int("--entropy-bins", "N", "entropy bins, default 20", &entropy_bins)
        .Int("--ppl-bins", "N", "perplexity bins, default 4", &ppl_bins)
        .Text("--head-actions", "FIRST:STEP:COUNT", "head weights on record, default 0.8:0.025:29",
              &head_actions)
        .Text("--gate-actions", "FIRST:STEP:COUNT", "gates on record, default 0.8:0.01:21",
              &gate_actions);
    threads.AddTo(parser);
  }

  // Checks the flags and puts them, and pointers to `paths`, into `options`.
  absl::Status Fill(const std::vector<const char*>& paths, keepset_compile_options& options) const {
    KEEPSET_RETURN_IF_ERROR(CheckAtLeast("--entropy-bins", entropy_bins, 1));
    KEEPSET_RETURN_IF_ERROR(CheckAtLeast("--ppl-bins", ppl_bins, 1));
    KEEPSET_RETURN_IF_ERROR(threads.Check());
    KEEPSET_RETURN_IF_ERROR(ParseActions("--head-actions", head_actions, options.head_actions));
    KEEPSET_RETURN_IF_ERROR(ParseActions("--gate-actions", gate_actions, options.gate_actions));
    options.struct_size = sizeof(options);
    options.record_paths = paths.data();
    options.num_record_paths = paths.size();
    options.entropy_bins = entropy_bins.value_or(0);
    options.ppl_bins = ppl_bins.value_or(0);
    options.num_threads = threads.value();
    options.conservative_weight = std::numeric_limits<double>::quiet_NaN();
    return absl::OkStatus();
  }
};

std::string Int(const Json& json, const char* key) {
  return absl::StrCat(json.value(key, int64_t{0}));
}

std::string KindLine(const char* kind, const Json& report) {
  const Json& per_state = report["records_per_state"];
  return absl::StrCat(kind, ": ", Int(report, "supported_states"), " states supported, ",
                      Int(report, "unsupported_states"), " not; records per state ",
                      Int(per_state, "min"), "..", Int(per_state, "max"), "; ",
                      Int(report, "close_states"), " choices within two standard errors\n");
}

std::string ComparisonLine(const char* kind, const Json& report) {
  return absl::StrFormat("%s: adam chooses otherwise in %s of %s states, by %.4f on average\n",
                         kind, Int(report, "different_states"), Int(report, "states"),
                         report.value("mean_difference", 0.0));
}

// What a person should know of a compilation before using its table.
std::string CompileText(const Json& report) {
  std::string text =
      absl::StrCat("records: ", Int(report["records"], "accepted"), " accepted, ",
                   Int(report["records"], "rejected"), " rejected\n",
                   KindLine("head", report["head"]), KindLine("gate", report["gate"]));
  if (report.contains("comparison")) {
    absl::StrAppend(&text, ComparisonLine("head", report["comparison"]["head"]),
                    ComparisonLine("gate", report["comparison"]["gate"]));
  }
  return text;
}

std::string ActionLines(const Json& kind) {
  std::string text;
  for (const Json& entry : kind["actions"]) {
    absl::StrAppendFormat(&text, "  action %.3f  %s\n", entry.value("action", 0.0),
                          Int(entry, "records"));
  }
  return text;
}

// One row per entropy bin, one column per perplexity bin.
std::string CoverageLines(const Json& coverage) {
  std::string text =
      absl::StrCat("risk cells with records: ", Int(coverage, "covered_cells"), " of ",
                   Int(coverage, "cells"), " (rows: entropy bins, columns: perplexity bins)\n");
  for (const Json& row : coverage["records_per_cell"]) {
    for (const Json& cell : row) absl::StrAppendFormat(&text, " %8d", cell.get<int64_t>());
    text += "\n";
  }
  return text;
}

std::string SummaryText(const Json& summary) {
  const Json& records = summary["records"];
  std::string text =
      absl::StrCat("digest   ", summary.value("digest", ""), "\naccepted ",
                   Int(records, "accepted"), " (head ", Int(records, "head"), ", gate ",
                   Int(records, "gate"), ", unpaired ", Int(records, "unpaired"), ")\nrejected ",
                   Int(records, "rejected"), " (duplicates ", Int(records, "duplicates"), ")\n");
  for (const Json& rejection : records["first_rejections"]) {
    absl::StrAppend(&text, "  ", rejection.get<std::string>(), "\n");
  }
  for (const char* kind : {"head", "gate"}) {
    if (!summary.contains(kind)) continue;
    const Json& part = summary[kind];
    const Json& per_state = part["records_per_state"];
    absl::StrAppend(&text, kind, ": ", Int(part, "states"), " states, records per state ",
                    Int(per_state, "min"), "..", Int(per_state, "max"), ", median ",
                    Int(per_state, "median"), "\n", ActionLines(part));
  }
  if (summary.contains("coverage")) text += CoverageLines(summary["coverage"]);
  return text;
}

}  // namespace

absl::Status RunTablesCompile(absl::Span<const std::string> arguments, Console& console) {
  if (AsksForHeads(arguments)) return RunCompileHeads(arguments, console);
  NewTableFlags flags;
  RecordFlags records;
  std::optional<std::string> solver;
  std::optional<double> conservative_weight;
  FitFlags fit;
  std::optional<int64_t> max_rejected;
  std::optional<std::string> kind;
  bool independent = false;
  bool compare = false;
  FlagParser parser("tables compile",
                    "tables compile RECORDS... (--model-json FILE | --like FILE) --name NAME "
                    "--version V -o TABLE",
                    "Fits head weights and gates to calibration records (JSON lines).");
  flags.AddTo(parser);
  parser
      .Text("--kind", "KIND", "compilerkv (default) or observation_heads, which has its own flags",
            &kind)
      .Text("--solver", "NAME", "exact (default) or adam, the paper's optimiser", &solver)
      .Real("--conservative-weight", "X", "pull towards logged actions, default 0.75",
            &conservative_weight)
      .Switch("--allow-independent-records",
              "take records without paired_policy; the provenance says so", &independent)
      .Switch("--compare-solvers", "fit by both solvers and report where they differ", &compare)
      .Int("--max-rejected", "N", "bad records to count before one ends the run, default 0",
           &max_rejected);
  fit.AddTo(parser);
  records.AddTo(parser);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> paths,
                           parser.Parse(arguments, 1, kMostRecordFiles));
  KEEPSET_RETURN_IF_ERROR(flags.Check(RecordInputs(paths)));
  if (kind.has_value() && *kind != "compilerkv") {
    return UsageError(absl::StrCat("--kind=", *kind, ", want compilerkv or observation_heads"));
  }
  if (solver.has_value() && *solver != "exact" && *solver != "adam") {
    return UsageError(absl::StrCat("--solver=", *solver, ", want exact or adam"));
  }
  KEEPSET_RETURN_IF_ERROR(fit.Check());
  KEEPSET_RETURN_IF_ERROR(CheckAtLeast("--max-rejected", max_rejected, 0));
  keepset_compile_options options = {};
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<const char*> c_paths, RecordPaths(paths));
  KEEPSET_RETURN_IF_ERROR(records.Fill(c_paths, options));
  KEEPSET_ASSIGN_OR_RETURN(const std::string model, ReadModelJson(flags.model));
  options.model_json = model.c_str();
  options.name = flags.name->c_str();
  options.version = flags.version->c_str();
  options.out_path = flags.out->c_str();
  options.solver = solver.has_value() ? solver->c_str() : nullptr;
  if (conservative_weight.has_value()) options.conservative_weight = *conservative_weight;
  options.default_budget = fit.default_budget.value_or(0);
  options.max_rejected = max_rejected.value_or(0);
  options.created_unix_seconds = fit.created.value_or(0);
  options.independent_records = independent ? 1 : 0;
  options.compare_solvers = compare ? 1 : 0;
  const absl::StatusOr<std::string> json =
      RunOnRecords(options, keepset_table_compile, ShowReading, console);
  KEEPSET_RETURN_IF_ERROR(WriteStatus(json.status()));
  if (!flags.json) console.out << CompileText(Json::parse(*json, nullptr, false));
  return flags.Report(console, *json);
}

absl::Status RunTablesRecords(absl::Span<const std::string> arguments, Console& console) {
  RecordFlags records;
  bool json = false;
  FlagParser parser("tables records", "tables records RECORDS... [--json]",
                    "What calibration records hold: counts per state and action, coverage of the\n"
                    "risk cells, and every record that is refused.");
  parser.Switch("--json", "one JSON document", &json);
  records.AddTo(parser);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> paths,
                           parser.Parse(arguments, 1, kMostRecordFiles));
  keepset_compile_options options = {};
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<const char*> c_paths, RecordPaths(paths));
  KEEPSET_RETURN_IF_ERROR(records.Fill(c_paths, options));
  KEEPSET_ASSIGN_OR_RETURN(const std::string summary,
                           RunOnRecords(options, keepset_records_summarize, ShowReading, console));
  console.out << (json ? summary + "\n" : SummaryText(Json::parse(summary, nullptr, false)));
  return absl::OkStatus();
}

}  // namespace keepset::cli
