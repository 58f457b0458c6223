#include <cstring>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/capture_file.h"
#include "tables/table_file.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::ElementsAre;

std::string GoldenPath(absl::string_view name) {
  return absl::StrCat(KEEPSET_SOURCE_DIR, "/tests/golden/", name);
}

// The content of tests/golden/table.safetensors; literals only, so that no rounding differs between
// machines.
CompilerKvTableContent GoldenTable() {
  CompilerKvTableContent content;
  content.name = "golden";
  content.version = "2026-11-22.1";
  content.model = SmallModel();
  content.model.rope_theta = 10000.0;
  content.model.rope_json = R"({"theta":10000.0})";
  content.model.revision = "r1";
  content.budgets = {64, 32};
  content.default_budget = 64;
  content.entropy_edges = {2.5f};
  content.ppl_edges = {10.0f};
  content.head_weights = {0.8f, 0.825f, 0.85f, 0.875f, 0.9f, 1.0f, 1.25f, 1.5f,
                          1.5f, 1.25f,  1.0f,  0.9f,   0.8f, 0.8f, 0.8f,  0.8f};
  content.gate_thresholds = {0.8f, 0.81f, 0.82f, 0.83f, 0.9f, 0.91f, 0.92f, 0.93f,
                             1.0f, 0.99f, 0.98f, 0.97f, 0.8f, 0.8f,  0.8f,  0.8f};
  content.algorithm_json = R"({"name":"by hand"})";
  content.provenance_json = R"({"source":"hand-written"})";
  return content;
}

TEST(GoldenTable, IsWrittenByteForByte) {
  const auto golden = SafetensorsFile::Open(GoldenPath("table.safetensors"), ReadMode::kCopy);
  ASSERT_TRUE(golden.ok()) << golden.status();
  const auto written = SerializeTable(GoldenTable());
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_EQ((*SafetensorsFile::Parse(AsBytes(*written), "written"))->Digest(), (*golden)->Digest());
}

TEST(GoldenTable, ReadsBackWithItsDigest) {
  const auto table = ReadTable(GoldenPath("table.safetensors"));
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(
      (*table)->identity(),
      (TableIdentity{"golden", "2026-11-22.1",
                     "sha256:1e4c7686ad17cc8441257509b46ce48cebf23107c1be9dddc83d448bdf186580"}));
  EXPECT_EQ((*table)->model(), GoldenTable().model);
  const auto slice =
      (*table)->AsCompilerKv()->Slice(32, TableBudgetMatch::kExact, 2, LayerMatch::kExact);
  ASSERT_TRUE(slice.ok()) << slice.status();
  EXPECT_EQ(slice->head_weight(0, 1), 1.25f);
  EXPECT_EQ(slice->gate(0, 1, 0), 0.98f);
}

TEST(GoldenPublicLibrary, ItsTableIsRead) {
  const auto table = ReadTable(GoldenPath("public_library_table.safetensors"));
  ASSERT_TRUE(table.ok()) << table.status();
  const CompilerKvTable& values = *(*table)->AsCompilerKv();
  EXPECT_THAT(values.budgets(), ElementsAre(64, 32));
  EXPECT_EQ(*values.DefaultBudget(), 32);
  EXPECT_EQ(values.head_weights().front(), 0.8f);
  EXPECT_EQ(values.head_weights().back(), 1.5f);
  EXPECT_TRUE(values.ppl_edges().empty());
  EXPECT_EQ((*table)->model().rope_theta, 10000.0);
}

TEST(GoldenPublicLibrary, ItsCaptureIsRead) {
  const auto capture = CaptureFile::Open(GoldenPath("public_library_capture.safetensors"));
  ASSERT_TRUE(capture.ok()) << capture.status();
  const CaptureInfo& info = (*capture)->info();
  EXPECT_EQ(info.kv_dtype, TensorDType::kF16);
  EXPECT_THAT(info.row_positions, ElementsAre(2, 5));
  EXPECT_THAT(info.input_ids, ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_EQ((*capture)->FindSpan("système")->end, 3);
  const uint16_t first_row[] = {0x0000, 0x3800, 0x3c00, 0xc000};
  EXPECT_EQ(std::memcmp((*capture)->layers()[1].k.bytes.data(), first_row, sizeof(first_row)), 0);
}

}  // namespace
}  // namespace keepset::tables
