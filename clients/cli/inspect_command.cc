#include "clients/cli/inspect_command.h"

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/heat_map.h"
#include "clients/cli/heat_map_image.h"
#include "clients/cli/table_text.h"

namespace keepset::cli {
namespace {

using Arguments = absl::Span<const std::string>;
using Json = nlohmann::ordered_json;

constexpr int kManyFiles = 1 << 20;
constexpr size_t kShownCells = 10;

std::string Number(const Json& value) {
  return value.is_number() ? absl::StrFormat("%.3f", value.get<double>()) : "not defined";
}

std::string BudgetText(const Json& budget) {
  return budget.is_number() ? absl::StrCat("budget ", budget.get<int64_t>()) : "any budget";
}

std::string RankingText(const Json& rankings) {
  std::string text =
      absl::StrCat("head rankings: mean over layers Spearman ", Number(rankings["mean_spearman"]),
                   ", Kendall ", Number(rankings["mean_kendall"]), "\n");
  for (const Json& layer : rankings["by_layer"]) {
    absl::StrAppend(&text, "  ", BudgetText(layer["budget"]), ", layer ",
                    layer.value("layer", int64_t{0}), ": Spearman ", Number(layer["spearman"]),
                    ", Kendall ", Number(layer["kendall"]), "\n");
  }
  return text;
}

std::string CellsText(const std::string& tensor, const Json& part) {
  const int64_t changed = part.value("changed", int64_t{0});
  std::string text = absl::StrFormat("%s: %d of %d cells changed", tensor, changed,
                                     part.value("compared", int64_t{0}));
  if (changed == 0) return text + "\n";
  absl::StrAppendFormat(&text, ", by %.3f on average, %.3f at most; the largest:\n",
                        part.value("mean", 0.0), part.value("largest", 0.0));
  const Json& cells = part["cells"];
  for (size_t i = 0; i < cells.size() && i < kShownCells; ++i) {
    const Json& cell = cells[i];
    absl::StrAppend(&text, "  ", BudgetText(cell["budget"]), ", layer ",
                    cell.value("layer", int64_t{0}));
    if (cell.contains("head")) {
      absl::StrAppend(&text, ", head ", cell.value("head", int64_t{0}));
    } else {
      absl::StrAppend(&text, ", entropy bin ", cell.value("entropy_bin", int64_t{0}),
                      ", perplexity bin ", cell.value("ppl_bin", int64_t{0}));
    }
    absl::StrAppend(&text, ": ", cell.value("a", 0.0), " -> ", cell.value("b", 0.0), "\n");
  }
  return text;
}

std::string ComparisonText(const Json& comparison) {
  std::string text;
  if (comparison["head_rankings"].is_object()) text += RankingText(comparison["head_rankings"]);
  for (const char* tensor : {"head_weights", "gate_thresholds"}) {
    if (comparison[tensor].is_object()) text += CellsText(tensor, comparison[tensor]);
  }
  return text;
}

}  // namespace

absl::Status RunTablesInspect(Arguments arguments, Console& console) {
  bool json = false;
  std::optional<std::string> png;
  FlagParser parser(
      "tables inspect", "tables inspect FILE... [--json] [--png PICTURE]",
      "What a table file says: identity, model, provenance, tensors, bins, and a heat "
      "map\nof head weights and gates (in colour on a terminal; NO_COLOR=1 turns that "
      "off).");
  parser.Switch("--json", "one JSON document per file, without heat maps", &json)
      .Text("--png", "PICTURE", "also draw the heat maps of one table into this file", &png);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> files,
                           parser.Parse(arguments, 1, kManyFiles));
  if (png.has_value()) {
    if (files.size() > 1) {
      return UsageError(absl::StrCat("--png with ", files.size(), " tables, want 1"));
    }
    KEEPSET_RETURN_IF_ERROR(CheckOutput("--png", *png, {{"table", files[0]}}));
  }
  for (const std::string& file : files) {
    KEEPSET_ASSIGN_OR_RETURN(const TableHandle table, LoadTable(file));
    const char* document = keepset_table_inspect(table.get());
    KEEPSET_ASSIGN_OR_RETURN(const std::vector<HeatMap> maps, HeatMapsOf(table.get()));
    if (png.has_value()) {
      if (maps.empty()) {
        return RefusedError(absl::StrCat(file, ": kind ", keepset_table_kind(table.get()),
                                         " has no heat map to draw"));
      }
      KEEPSET_ASSIGN_OR_RETURN(const RgbImage image, DrawHeatMaps(maps));
      const absl::Status written = WritePng(*png, image);
      if (!written.ok()) return WithExitCode(written, ExitCode::kFailed);
    }
    if (json) {
      console.out << document << "\n";
      continue;
    }
    console.out << TableText(file, document);
    for (const HeatMap& map : maps) {
      console.out << "\n" << HeatMapText(map, console.color, console.columns);
    }
    if (png.has_value() && console.wants_summary()) {
      console.out << "wrote " << *png << ": " << maps.size() << " maps in the order above\n";
    }
  }
  return absl::OkStatus();
}

absl::Status RunTablesDiff(Arguments arguments, Console& console) {
  bool json = false;
  FlagParser parser(
      "tables diff", "tables diff A B [--json]",
      "What differs between two tables, a line each, how alike they rank the heads of a "
      "layer,\nand the cells that changed; nothing when nothing differs. Exit code 0 in "
      "both cases.");
  parser.Switch("--json", "one JSON document", &json);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> files, parser.Parse(arguments, 2, 2));
  KEEPSET_ASSIGN_OR_RETURN(const TableHandle a, LoadTable(files[0]));
  KEEPSET_ASSIGN_OR_RETURN(const TableHandle b, LoadTable(files[1]));
  const char* text = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_table_diff(a.get(), b.get(), &text)));
  const std::vector<std::string> lines = absl::StrSplit(text, '\n', absl::SkipEmpty());
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_table_compare(a.get(), b.get(), &text)));
  const Json comparison = Json::parse(text, nullptr, false);
  if (json) {
    const Json document = {
        {"a", files[0]}, {"b", files[1]}, {"differences", lines}, {"comparison", comparison}};
    console.out << document.dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
    return absl::OkStatus();
  }
  for (const std::string& line : lines) console.out << line << "\n";
  if (!lines.empty()) console.out << ComparisonText(comparison);
  if (lines.empty() && console.wants_summary()) console.out << "no difference\n";
  return absl::OkStatus();
}

}  // namespace keepset::cli
