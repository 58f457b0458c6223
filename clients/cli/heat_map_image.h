// Heat maps as one image, below each other, each with its colour scale under it.
#ifndef KEEPSET_CLIENTS_CLI_HEAT_MAP_IMAGE_H_
#define KEEPSET_CLIENTS_CLI_HEAT_MAP_IMAGE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "clients/cli/heat_map.h"

namespace keepset::cli {

struct RgbImage {
  int64_t width = 0;
  int64_t height = 0;
  std::vector<uint8_t> pixels;  // [height, width, 3]
};

// InvalidArgument for maps that no picture can hold (above 64 megapixels).
absl::StatusOr<RgbImage> DrawHeatMaps(absl::Span<const HeatMap> maps);

// Replaces `path` at once by the image as PNG, or leaves it as it was.
absl::Status WritePng(const std::string& path, const RgbImage& image);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_HEAT_MAP_IMAGE_H_
