#include "clients/cli/heat_map.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "clients/cli/engine_handles.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr absl::string_view kInk = " .:-=+*#%@";
constexpr int kRowLabel = 5;     // "  12 "
constexpr int kNumberWidth = 5;  // " 1.25"
constexpr int kMostNumberColumns = 24;

// The range of the paper's action grid, widened to what the table holds.
void SetScale(float low, float high, HeatMap& map) {
  const auto [least, most] = std::minmax_element(map.values.begin(), map.values.end());
  map.low = map.values.empty() ? low : std::min(low, *least);
  map.high = map.values.empty() ? high : std::max(high, *most);
}

double PlaceOf(const HeatMap& map, double value) {
  return map.high > map.low ? (value - map.low) / (map.high - map.low) : 0;
}

absl::StatusOr<absl::Span<const float>> ValuesOf(const keepset_table* table, const char* tensor) {
  const float* values = nullptr;
  size_t count = 0;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_table_values(table, tensor, &values, &count)));
  return absl::MakeConstSpan(values, count);
}

// Columns in groups of perplexity bins: [L, E, P] to [L, P * E].
std::vector<float> ByPplBin(absl::Span<const float> gates, int64_t layers, int64_t entropy_bins,
                            int64_t ppl_bins) {
  std::vector<float> out;
  out.reserve(gates.size());
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t ppl = 0; ppl < ppl_bins; ++ppl) {
      for (int64_t entropy = 0; entropy < entropy_bins; ++entropy) {
        out.push_back(gates[(layer * entropy_bins + entropy) * ppl_bins + ppl]);
      }
    }
  }
  return out;
}

// The nearest colour of the 6 x 6 x 6 cube that 256-colour terminals have.
int TerminalColor(double place) {
  const std::array<uint8_t, 3> rgb = ScaleColor(place);
  const auto level = [](uint8_t part) { return static_cast<int>(std::lround(part / 51.0)); };
  return 16 + 36 * level(rgb[0]) + 6 * level(rgb[1]) + level(rgb[2]);
}

std::string Colored(const std::string& text, double place) {
  const int ink = place > 0.55 ? 16 : 231;  // black on bright, white on dark
  return absl::StrCat("\x1b[48;5;", TerminalColor(place), ";38;5;", ink, "m", text, "\x1b[0m");
}

enum class CellForm { kNumber, kCharacter };

struct Layout {
  CellForm form = CellForm::kCharacter;
  int64_t fold = 1;  // neighbouring columns drawn as one
};

Layout LayoutFor(const HeatMap& map, int width) {
  const int64_t room = std::max(width - kRowLabel, 1);
  const int64_t gaps = map.columns / map.group_columns - 1;
  if (map.columns <= kMostNumberColumns && map.columns * kNumberWidth + gaps <= room) {
    return {CellForm::kNumber, 1};
  }
  int64_t fold = 1;
  const auto drawn = [&] { return (gaps + 1) * ((map.group_columns + fold - 1) / fold) + gaps; };
  while (drawn() > room && fold < map.group_columns) ++fold;
  return {CellForm::kCharacter, fold};
}

std::string Cell(const HeatMap& map, double value, CellForm form, TextColor color) {
  const double place = PlaceOf(map, value);
  if (form == CellForm::kNumber) {
    const std::string number = absl::StrFormat("%*.2f", kNumberWidth - 1, value);
    return color == TextColor::kColor ? " " + Colored(number, place) : " " + number;
  }
  const auto step =
      static_cast<std::size_t>(std::clamp(std::lround(place * static_cast<double>(kInk.size() - 1)),
                                          0L, static_cast<long>(kInk.size() - 1)));
  return color == TextColor::kColor ? Colored(" ", place) : std::string(1, kInk[step]);
}

std::string Legend(const HeatMap& map, const Layout& layout, TextColor color) {
  std::string legend = absl::StrFormat("  %.2f ", map.low);
  constexpr int kSteps = 10;
  for (int i = 0; i < kSteps; ++i) {
    const double value = map.low + (map.high - map.low) * i / (kSteps - 1);
    legend += Cell(map, value, CellForm::kCharacter, color);
  }
  absl::StrAppendFormat(&legend, " %.2f", map.high);
  if (layout.fold > 1) {
    absl::StrAppend(&legend, "; a character is the mean of ", layout.fold, " columns");
  }
  return legend + "\n";
}

}  // namespace

absl::StatusOr<std::vector<HeatMap>> HeatMapsOf(const keepset_table* table) {
  const Json document = Json::parse(keepset_table_inspect(table), nullptr, false);
  std::vector<HeatMap> maps;
  if (!document.contains("tensors") || !document["tensors"].contains("head_weights")) return maps;
  const int64_t layers = document["model"].value("num_layers", int64_t{0});
  const int64_t heads = document["model"].value("num_qo_heads", int64_t{0});
  const int64_t entropy_bins = document.value("entropy_bins", int64_t{1});
  const int64_t ppl_bins = document.value("ppl_bins", int64_t{1});
  std::vector<std::string> budgets = {"any budget"};
  if (document["budgets"].is_array()) {
    budgets.clear();
    for (const Json& budget : document["budgets"]) {
      budgets.push_back(absl::StrCat("budget ", budget.get<int64_t>()));
    }
  }
  KEEPSET_ASSIGN_OR_RETURN(const auto weights, ValuesOf(table, "head_weights"));
  KEEPSET_ASSIGN_OR_RETURN(const auto gates, ValuesOf(table, "gate_thresholds"));
  for (size_t i = 0; i < budgets.size(); ++i) {
    HeatMap map;
    map.title = absl::StrCat("head_weights, ", budgets[i]);
    map.columns_label = "query heads";
    map.rows = layers;
    map.columns = map.group_columns = heads;
    const auto row = weights.subspan(i * layers * heads, layers * heads);
    map.values.assign(row.begin(), row.end());
    SetScale(0.8f, 1.5f, map);
    maps.push_back(std::move(map));
  }
  for (size_t i = 0; i < budgets.size(); ++i) {
    HeatMap map;
    map.title = absl::StrCat("gate_thresholds, ", budgets[i]);
    map.columns_label = absl::StrCat("entropy bins, a block per perplexity bin (", ppl_bins, ")");
    map.rows = layers;
    map.columns = entropy_bins * ppl_bins;
    map.group_columns = entropy_bins;
    map.values = ByPplBin(gates.subspan(i * layers * map.columns, layers * map.columns), layers,
                          entropy_bins, ppl_bins);
    SetScale(0.8f, 1.0f, map);
    maps.push_back(std::move(map));
  }
  return maps;
}

std::string HeatMapText(const HeatMap& map, TextColor color, int width) {
  const Layout layout = LayoutFor(map, width);
  std::string text = absl::StrCat(map.title, ": rows layers 0..", map.rows - 1, ", columns ",
                                  map.columns_label, "\n");
  for (int64_t row = 0; row < map.rows; ++row) {
    absl::StrAppendFormat(&text, "%*d ", kRowLabel - 1, row);
    for (int64_t group = 0; group < map.columns; group += map.group_columns) {
      if (group > 0) text += color == TextColor::kColor ? " " : "|";
      for (int64_t first = 0; first < map.group_columns; first += layout.fold) {
        const int64_t end = std::min(first + layout.fold, map.group_columns);
        double sum = 0;
        for (int64_t column = first; column < end; ++column) {
          sum += map.values[row * map.columns + group + column];
        }
        text += Cell(map, sum / static_cast<double>(end - first), layout.form, color);
      }
    }
    text += "\n";
  }
  return text + Legend(map, layout, color);
}

std::array<uint8_t, 3> ScaleColor(double place) {
  // Violet, blue, green, yellow: brightness rises with the value.
  constexpr std::array<std::array<double, 3>, 5> kStops = {
      {{68, 1, 84}, {59, 82, 139}, {33, 145, 140}, {94, 201, 98}, {253, 231, 37}}};
  const double at = std::clamp(place, 0.0, 1.0) * (kStops.size() - 1);
  const auto below = std::min(static_cast<std::size_t>(at), kStops.size() - 2);
  const double share = at - static_cast<double>(below);
  std::array<uint8_t, 3> color = {};
  for (std::size_t i = 0; i < color.size(); ++i) {
    color[i] = static_cast<uint8_t>(
        std::lround(kStops[below][i] + share * (kStops[below + 1][i] - kStops[below][i])));
  }
  return color;
}

}  // namespace keepset::cli
