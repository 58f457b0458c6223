// A tensor of a table as a picture: rows are layers, columns heads or bins. Drawn as text here, as
// an image in heat_map_image.h.
#ifndef KEEPSET_CLIENTS_CLI_HEAT_MAP_H_
#define KEEPSET_CLIENTS_CLI_HEAT_MAP_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/console.h"
#include "engine/keepset.h"

namespace keepset::cli {

struct HeatMap {
  std::string title;
  std::string columns_label;
  int64_t rows = 0;
  int64_t columns = 0;        // of all groups together
  int64_t group_columns = 0;  // columns that belong together: the entropy bins of a perplexity bin
  std::vector<float> values;  // [rows, columns]
  // What the ends of the colour scale stand for; wide enough for every value.
  float low = 0;
  float high = 1;
};

// head_weights [L, H] and gate_thresholds [L, P * E], per budget. None for a table without these
// tensors.
absl::StatusOr<std::vector<HeatMap>> HeatMapsOf(const keepset_table* table);

// At most `width` characters wide, more only for the titles: numbers where they fit, else a
// character a cell, else the mean of neighbouring columns, and says which. kColor adds terminal
// escape codes.
std::string HeatMapText(const HeatMap& map, TextColor color, int width);

// Red, green, blue of a place on the scale, 0 low .. 1 high; dark to bright, also for the
// colour-blind.
std::array<uint8_t, 3> ScaleColor(double place);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_HEAT_MAP_H_
