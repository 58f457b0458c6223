#include <png.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "clients/cli/command_list.h"
#include "clients/cli/heat_map.h"
#include "clients/cli/heat_map_image.h"
#include "clients/cli/table_text.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/cli_runner.h"
#include "tests/tables/table_samples.h"

namespace keepset::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using Json = nlohmann::json;

HeatMap Ramp(int64_t rows, int64_t columns, int64_t group_columns) {
  HeatMap map;
  map.title = "ramp";
  map.columns_label = "steps";
  map.rows = rows;
  map.columns = columns;
  map.group_columns = group_columns;
  for (int64_t i = 0; i < rows * columns; ++i) {
    map.values.push_back(static_cast<float>(i % columns) / static_cast<float>(columns - 1));
  }
  return map;
}

std::string Row(const std::string& text, int row) {
  std::istringstream lines(text);
  std::string line;
  for (int i = 0; i <= row + 1; ++i) std::getline(lines, line);
  return line;
}

RgbImage ReadPng(const std::string& path) {
  png_image png = {};
  png.version = PNG_IMAGE_VERSION;
  RgbImage image;
  if (png_image_begin_read_from_file(&png, path.c_str()) == 0) return image;
  png.format = PNG_FORMAT_RGB;
  image.width = png.width;
  image.height = png.height;
  image.pixels.resize(PNG_IMAGE_SIZE(png));
  if (png_image_finish_read(&png, nullptr, image.pixels.data(), 0, nullptr) == 0) return {};
  return image;
}

class TablesInspect : public CliTest {
 protected:
  TablesInspect() {
    tables::CompilerKvTableContent content = tables::SmallTable();
    Write("a", content);
    content.version = "2";
    content.head_weights[0] += 0.5f;  // budget 256, layer 0: the last head is first now
    content.gate_thresholds[5] = 1.0f;
    Write("b", content);
  }

  void Write(const std::string& name, const tables::CompilerKvTableContent& content) {
    const absl::StatusOr<std::string> bytes = tables::SerializeTable(content);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    std::ofstream(Path(name), std::ios::binary) << *bytes;
  }

  // As on a terminal of that width.
  std::string OnTerminal(TextColor color, int columns) {
    std::ostringstream out;
    std::ostringstream err;
    Console console{
        out,     err, StreamKind::kTerminal, StreamKind::kPipe, OutputFormat::kText, color,
        columns, ""};
    EXPECT_EQ(RunKeepset({"tables", "inspect", Path("a")}, console), 0) << err.str();
    return out.str();
  }
};

TEST_F(TablesInspect, InAPipeTheMapIsPlainText) {
  const CliRun run = RunBinary({"tables", "inspect", Path("a")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, AllOf(HasSubstr("head_weights, budget 256: rows layers 0..1"),
                             HasSubstr("   0  0.80 0.85 0.90 0.95\n"),
                             HasSubstr("gate_thresholds, budget 128"), Not(HasSubstr("\x1b"))));
}

TEST_F(TablesInspect, OnATerminalTheMapIsColoured) {
  EXPECT_THAT(OnTerminal(TextColor::kColor, 80), HasSubstr("\x1b[48;5;"));
}

TEST_F(TablesInspect, WithoutColourATerminalGetsPlainText) {
  EXPECT_THAT(OnTerminal(TextColor::kPlain, 80), Not(HasSubstr("\x1b")));
}

TEST_F(TablesInspect, JsonIsOneDocumentWithoutAMap) {
  const CliRun run = RunBinary({"tables", "inspect", Path("a"), "--json"});
  EXPECT_TRUE(IsOneLine(run.out));
  EXPECT_EQ(Json::parse(run.out)["name"], "small");
}

TEST_F(TablesInspect, PngShowsTheWeightsByColour) {
  const CliRun run = RunBinary({"tables", "inspect", Path("a"), "--png", Path("a.png")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const RgbImage image = ReadPng(Path("a.png"));
  ASSERT_GT(image.width, 0);
  // Cells of 16 pixels behind a margin of 8; layer 0, head 3 of budget 256 is 0.95 of 0.8..1.5.
  const auto pixel = [&](int64_t x, int64_t y) {
    const uint8_t* p = image.pixels.data() + 3 * (y * image.width + x);
    return std::array<uint8_t, 3>{p[0], p[1], p[2]};
  };
  EXPECT_EQ(pixel(8, 8), ScaleColor(0));
  EXPECT_EQ(pixel(8 + 3 * 16, 8), ScaleColor((0.95f - 0.8f) / (1.5f - 0.8f)));
  EXPECT_EQ(pixel(0, 0), (std::array<uint8_t, 3>{255, 255, 255}));
}

TEST_F(TablesInspect, PngOfSeveralTablesIsUsage) {
  const CliRun run = RunBinary({"tables", "inspect", Path("a"), Path("b"), "--png", Path("a.png")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_FALSE(std::filesystem::exists(Path("a.png")));
}

TEST_F(TablesInspect, ADamagedTableLeavesNoPicture) {
  std::filesystem::resize_file(Path("a"), 100);
  const CliRun run = RunBinary({"tables", "inspect", Path("a"), "--png", Path("a.png")});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_FALSE(std::filesystem::exists(Path("a.png")));
}

TEST_F(TablesInspect, APictureThatCannotBeWrittenIsAFailure) {
  const std::string too_long(300, 'x');
  EXPECT_EQ(RunBinary({"tables", "inspect", Path("a"), "--png", Path(too_long)}).exit_code, 5);
  EXPECT_THAT(Files(), testing::UnorderedElementsAre("a", "b"));
}

TEST_F(TablesInspect, TheTableAsAPictureIsUsageAndLeavesItAsItIs) {
  const auto size = std::filesystem::file_size(Path("a"));
  const CliRun run = RunBinary({"tables", "inspect", Path("a"), "--png", Path("a")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, testing::HasSubstr("is the same file as the table " + Path("a")));
  EXPECT_EQ(std::filesystem::file_size(Path("a")), size);
}

TEST_F(TablesInspect, ADirectoryAsAPictureIsUsage) {
  std::filesystem::create_directory(Path("a.png"));
  EXPECT_EQ(RunBinary({"tables", "inspect", Path("a"), "--png", Path("a.png")}).exit_code, 2);
  EXPECT_THAT(Files(), testing::UnorderedElementsAre("a", "b", "a.png"));
}

TEST_F(TablesInspect, DiffTellsRankingsAndChangedCells) {
  const CliRun run = RunBinary({"tables", "diff", Path("a"), Path("b")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out,
              AllOf(HasSubstr("  budget 256, layer 0: Spearman -0.200, Kendall 0.000\n"),
                    HasSubstr("head_weights: 1 of 16 cells changed"),
                    HasSubstr("  budget 256, layer 0, head 0: 0.8 -> 1.3\n"),
                    HasSubstr("gate_thresholds: 1 of 16 cells changed"),
                    HasSubstr("  budget 256, layer 1, entropy bin 0, perplexity bin 1: ")));
}

TEST_F(TablesInspect, DiffAsJsonHoldsTheComparison) {
  const CliRun run = RunBinary({"tables", "diff", Path("a"), Path("b"), "--json"});
  const Json comparison = Json::parse(run.out)["comparison"];
  EXPECT_EQ(comparison["shared_budgets"], Json::parse("[256, 128]"));
  EXPECT_EQ(comparison["head_rankings"]["by_layer"].size(), 4);
  EXPECT_EQ(comparison["head_weights"]["changed"], 1);
}

TEST_F(TablesInspect, DiffOfADamagedTableIsRefused) {
  std::filesystem::resize_file(Path("b"), 100);
  EXPECT_EQ(RunBinary({"tables", "diff", Path("a"), Path("b")}).exit_code, 3);
}

TEST_F(TablesInspect, DiffOfAMissingTableIsUsage) {
  EXPECT_EQ(RunBinary({"tables", "diff", Path("a"), Path("nowhere")}).exit_code, 2);
}

TEST(TableText, AForeignTextEndsNoLineAndReachesNoTerminal) {
  const std::string text = TableText(
      "f", R"({"provenance":{"note":"a\n  provenance.source  x\u001b[2J\u007f","k\u001b\n":1},)"
           R"("evaluation":{"maß":["grün\u009b"]}})");
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 4) << text;
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_EQ(text.find('\x7f'), std::string::npos);
  EXPECT_THAT(
      text, AllOf(HasSubstr("a\\x0a  provenance.source  x\\x1b[2J\\x7f"), HasSubstr("k\\x1b\\x0a"),
                  HasSubstr("grün\\xc2\\x9b"), HasSubstr("evaluation.maß")));
}

TEST(HeatMapText, FewColumnsAreNumbers) {
  EXPECT_EQ(Row(HeatMapText(Ramp(2, 3, 3), TextColor::kPlain, 80), 1), "   1  0.00 0.50 1.00");
}

TEST(HeatMapText, ManyColumnsAreACharacterEachInTheirGroups) {
  HeatMap map = Ramp(1, 30, 15);
  std::fill(map.values.begin(), map.values.end(), 0.0f);
  map.values[0] = map.values[29] = 1.0f;
  EXPECT_EQ(Row(HeatMapText(map, TextColor::kPlain, 80), 0),
            "   0 @" + std::string(14, ' ') + "|" + std::string(14, ' ') + "@");
}

TEST(HeatMapText, MoreColumnsThanTheLineAreFoldedAndSaidSo) {
  const std::string text = HeatMapText(Ramp(1, 400, 400), TextColor::kPlain, 80);
  EXPECT_LE(Row(text, 0).size(), 80);
  EXPECT_THAT(text, HasSubstr("a character is the mean of 6 columns"));
}

TEST(HeatMapText, EqualValuesAreDrawn) {
  HeatMap map = Ramp(1, 3, 3);
  map.values.assign(3, 0.9f);
  map.low = map.high = 0.9f;
  EXPECT_EQ(Row(HeatMapText(map, TextColor::kPlain, 80), 0), "   0  0.90 0.90 0.90");
}

TEST(DrawHeatMaps, RefusesPicturesThatNobodyCanHold) {
  HeatMap map;
  map.rows = map.columns = map.group_columns = 1 << 14;
  EXPECT_TRUE(absl::IsInvalidArgument(DrawHeatMaps({map}).status()));
}

}  // namespace
}  // namespace keepset::cli
