#include "clients/cli/heat_map_image.h"

#include <png.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace keepset::cli {
namespace {

constexpr int64_t kLargestCell = 16;    // pixels
constexpr int64_t kWantedWidth = 1600;  // cells shrink to fit, down to a pixel
constexpr int64_t kMargin = 8;
constexpr int64_t kScaleHeight = 6;
constexpr int64_t kScaleWidth = 128;
constexpr int64_t kMostPixels = int64_t{64} << 20;
constexpr std::array<uint8_t, 3> kWhite = {255, 255, 255};

int64_t GapsOf(const HeatMap& map) { return map.columns / map.group_columns - 1; }

int64_t CellSize(absl::Span<const HeatMap> maps) {
  int64_t columns = 1;
  for (const HeatMap& map : maps) columns = std::max(columns, map.columns + GapsOf(map));
  return std::clamp(kWantedWidth / columns, int64_t{1}, kLargestCell);
}

void Fill(RgbImage& image, int64_t left, int64_t top, int64_t width, int64_t height,
          const std::array<uint8_t, 3>& color) {
  for (int64_t y = top; y < top + height; ++y) {
    for (int64_t x = left; x < left + width; ++x) {
      std::copy(color.begin(), color.end(), image.pixels.begin() + 3 * (y * image.width + x));
    }
  }
}

void DrawMap(const HeatMap& map, int64_t cell, int64_t top, RgbImage& image) {
  const float range = map.high > map.low ? map.high - map.low : 1;
  for (int64_t row = 0; row < map.rows; ++row) {
    for (int64_t column = 0; column < map.columns; ++column) {
      // A blank column separates the groups.
      const int64_t place = column + column / map.group_columns;
      const float value = map.values[row * map.columns + column];
      Fill(image, kMargin + place * cell, top + row * cell, cell, cell,
           ScaleColor((value - map.low) / range));
    }
  }
  const int64_t scale_top = top + map.rows * cell + kMargin / 2;
  for (int64_t x = 0; x < kScaleWidth; ++x) {
    Fill(image, kMargin + x, scale_top, 1, kScaleHeight,
         ScaleColor(static_cast<double>(x) / (kScaleWidth - 1)));
  }
}

absl::Status FileError(const char* what, const std::string& path) {
  return absl::ErrnoToStatus(errno, absl::StrCat(path, ": cannot ", what));
}

absl::Status WriteAll(int fd, absl::Span<const char> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return FileError("write", path);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return fsync(fd) == 0 ? absl::OkStatus() : FileError("sync", path);
}

absl::Status ReplaceFile(const std::string& path, absl::Span<const char> bytes) {
  std::string temporary = absl::StrCat(path, ".XXXXXX");
  const int fd = mkstemp(temporary.data());
  if (fd < 0) return FileError("create", path);
  absl::Status status = WriteAll(fd, bytes, path);
  constexpr mode_t kReadableByAll = 0644;
  if (status.ok() && fchmod(fd, kReadableByAll) != 0) status = FileError("set the mode of", path);
  close(fd);
  if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0) {
    status = FileError("rename to", path);
  }
  if (!status.ok()) unlink(temporary.c_str());
  return status;
}

}  // namespace

absl::StatusOr<RgbImage> DrawHeatMaps(absl::Span<const HeatMap> maps) {
  const int64_t cell = CellSize(maps);
  RgbImage image;
  image.width = kScaleWidth;
  for (const HeatMap& map : maps) {
    image.width = std::max(image.width, (map.columns + GapsOf(map)) * cell);
    image.height += map.rows * cell + kMargin / 2 + kScaleHeight + kMargin;
  }
  image.width += 2 * kMargin;
  image.height += kMargin;
  if (image.width > kMostPixels / image.height) {
    return absl::InvalidArgumentError(absl::StrCat("picture of ", image.width, " x ", image.height,
                                                   " pixels, want at most ", kMostPixels));
  }
  image.pixels.resize(3 * image.width * image.height);
  Fill(image, 0, 0, image.width, image.height, kWhite);
  int64_t top = kMargin;
  for (const HeatMap& map : maps) {
    DrawMap(map, cell, top, image);
    top += map.rows * cell + kMargin / 2 + kScaleHeight + kMargin;
  }
  return image;
}

absl::Status WritePng(const std::string& path, const RgbImage& image) {
  png_image png = {};
  png.version = PNG_IMAGE_VERSION;
  png.format = PNG_FORMAT_RGB;
  png.width = static_cast<png_uint_32>(image.width);
  png.height = static_cast<png_uint_32>(image.height);
  const absl::Cleanup free_png = [&png] { png_image_free(&png); };
  png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(png);
  std::vector<char> bytes(size);
  if (png_image_write_to_memory(&png, bytes.data(), &size, /*convert_to_8_bit=*/0,
                                image.pixels.data(), /*row_stride=*/0, nullptr) == 0) {
    return absl::InternalError(absl::StrCat(path, ": PNG: ", png.message));
  }
  return ReplaceFile(path, absl::MakeConstSpan(bytes).first(size));
}

}  // namespace keepset::cli
