// keepset tables compile --kind observation_heads.
#include "clients/cli/compile_heads_command.h"

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/new_table.h"
#include "clients/cli/record_flags.h"
#include "engine/keepset.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

void ShowFolds(void* progress, int64_t done, int64_t total) {
  static_cast<Progress*>(progress)->Show(absl::StrFormat("fitting: %d of %d folds", done, total));
}

absl::StatusOr<std::vector<int64_t>> ToInts(absl::string_view flag,
                                            const std::vector<std::string>& texts) {
  std::vector<int64_t> values;
  for (const std::string& text : texts) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(text, &value)) {
      return UsageError(absl::StrCat(flag, "=", text, ", want an integer"));
    }
    values.push_back(value);
  }
  return values;
}

std::string ReportText(const Json& report) {
  std::string text = absl::StrFormat(
      "%d records, %d candidates: %d observations, pooling %d, dilation %d\n",
      report.value("records", 0), report.value("candidates", 0),
      static_cast<int>(report["observations"].size()), report["chosen"].value("pool_kernel", 0),
      report["chosen"].value("dilate", 0));
  for (const Json& one : report["observations"]) {
    absl::StrAppendFormat(&text, "  layer %d head %d %s  %.3f\n", one.value("layer", 0),
                          one.value("head", 0), one.value("rows", ""), one.value("weight", 0.0));
  }
  const Json& worst = report["worst_task_and_length"];
  absl::StrAppendFormat(
      &text,
      "recall of needed mass: held out %.3f, worst task %s %.3f (worst of its lengths and all: %s "
      "at "
      "%d tokens %.3f); every candidate alike %.3f, shuffled %.3f, best possible %.3f\n",
      report.value("held_out_recall", 0.0), report.value("worst_task", ""),
      report.value("worst_task_recall", 0.0), worst.value("task", ""), worst.value("length", 0),
      worst.value("recall", 0.0), report.value("uniform_recall", 0.0),
      report.value("shuffled_recall", 0.0), report.value("oracle_recall", 0.0));
  return text;
}

}  // namespace

absl::Status RunCompileHeads(absl::Span<const std::string> arguments, Console& console) {
  NewTableFlags table;
  std::optional<std::string> kind;
  std::vector<std::string> budget_texts;
  std::vector<std::string> kernel_texts;
  std::vector<std::string> dilation_texts;
  std::optional<int64_t> max_heads;
  std::optional<int64_t> num_heads;
  std::optional<int64_t> folds;
  FitFlags fit;
  ThreadsFlag threads;
  FlagParser parser("tables compile",
                    "tables compile --kind observation_heads RECORDS... --budget N... --name NAME "
                    "--version V -o TABLE",
                    "Chooses and weighs observing heads by the needed mass that they find in\n"
                    "observation records (python -m keepset.calibrate.observation_heads).");
  parser.Text("--kind", "KIND", "observation_heads", &kind)
      .Text("--name", "NAME", "the table's name", &table.name)
      .Text("--version", "V", "the table's version", &table.version)
      .Text("--out", "FILE", "table file to write", &table.out)
      .List("--budget", "N", "tokens kept; recall is averaged over all that are given",
            &budget_texts)
      .List("--pool-kernel", "N", "pooling to try, odd; default 1 and 5", &kernel_texts)
      .List("--dilate", "N", "forward dilation to try; default 0, 4 and 12", &dilation_texts)
      .Int("--max-heads", "N", "most observations, default 16", &max_heads)
      .Int("--num-heads", "N", "exactly so many; default: by validation", &num_heads)
      .Int("--folds", "N", "folds of the validation, default 4", &folds)
      .Switch("--json", "print what was written as JSON", &table.json)
      .Alias("-o", "--out");
  fit.AddTo(parser);
  threads.AddTo(parser);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> paths,
                           parser.Parse(arguments, 1, kMostRecordFiles));
  KEEPSET_RETURN_IF_ERROR(table.Check(RecordInputs(paths)));
  KEEPSET_RETURN_IF_ERROR(fit.Check());
  KEEPSET_RETURN_IF_ERROR(threads.Check());
  if (budget_texts.empty()) return UsageError("--budget is missing");
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> budgets, ToInts("--budget", budget_texts));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> kernels,
                           ToInts("--pool-kernel", kernel_texts));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> dilations,
                           ToInts("--dilate", dilation_texts));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<const char*> c_paths, RecordPaths(paths));
  keepset_compile_heads_options options = {};
  options.struct_size = sizeof(options);
  options.record_paths = c_paths.data();
  options.num_record_paths = c_paths.size();
  options.name = table.name->c_str();
  options.version = table.version->c_str();
  options.out_path = table.out->c_str();
  options.budgets = budgets.data();
  options.num_budgets = budgets.size();
  options.pool_kernels = kernels.data();
  options.num_pool_kernels = kernels.size();
  options.dilations = dilations.data();
  options.num_dilations = dilations.size();
  options.max_heads = max_heads.value_or(0);
  options.num_heads = num_heads.value_or(0);
  options.num_folds = folds.value_or(0);
  options.default_budget = fit.default_budget.value_or(0);
  options.created_unix_seconds = fit.created.value_or(0);
  options.num_threads = threads.value();
  const absl::StatusOr<std::string> json =
      RunOnRecords(options, keepset_table_compile_heads, ShowFolds, console);
  KEEPSET_RETURN_IF_ERROR(WriteStatus(json.status()));
  if (!table.json) console.out << ReportText(Json::parse(*json, nullptr, false));
  return table.Report(console, *json);
}

bool AsksForHeads(absl::Span<const std::string> arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--kind=observation_heads") return true;
    if (arguments[i] == "--kind" && i + 1 < arguments.size() &&
        arguments[i + 1] == "observation_heads") {
      return true;
    }
  }
  return false;
}

}  // namespace keepset::cli
