#include "tables/result_file.h"

#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

ResultLayer LayerWithKept(std::vector<int64_t> kept) {
  ResultLayer layer;
  layer.kept = std::move(kept);
  return layer;
}

ResultDocument SmallResult() {
  ResultDocument document;
  document.outcome = "compressed";
  document.reason = "none";
  document.policy = "compilerkv";
  document.scope = "layer_elastic";
  document.seq_len = 8;
  document.table = TableIdentity{"t", "1", "sha256:00"};
  document.entropy = 1.5;
  document.ppl = 12.5;
  document.entropy_bin = 0;
  document.ppl_bin = 1;
  document.layers = {LayerWithKept({2})};
  document.layers[0].candidates = {3};
  document.layers[0].filled = {0};
  document.layers[0].tau = 0.75;
  document.relaxed = {"table_budget: 512 served by 256"};
  document.backend = "cpu/avx2";
  document.bytes_before = 64;
  document.bytes_after = 16;
  return document;
}

const std::vector<int32_t> kKept = {1, 6};

void ExpectRefused(absl::string_view json, const std::vector<ResultIndexSet>& sets,
                   const std::vector<ResultGathered>& gathered, absl::string_view message) {
  const auto bytes = SerializeResult(json, sets, gathered);
  EXPECT_EQ(bytes.status().code(), absl::StatusCode::kInvalidArgument) << bytes.status();
  EXPECT_THAT(std::string(bytes.status().message()), HasSubstr(std::string(message)));
}

TEST(ResultJson, MatchesTheGoldenDocument) {
  EXPECT_EQ(
      ResultJson(SmallResult()),
      R"({"format":"keepset.result","format_version":1,"outcome":"compressed","reason":"none",)"
      R"("policy":"compilerkv","scope":"layer_elastic","seq_len":8,)"
      R"("table":{"name":"t","version":"1","digest":"sha256:00"},"entropy":1.5,"ppl":12.5,)"
      R"("entropy_bin":0,"ppl_bin":1,)"
      R"("layers":[{"candidates":3,"kept":2,"filled":0,"tau":0.75}],"defaulted_inputs":[],)"
      R"("relaxed":["table_budget: 512 served by 256"],"backend":"cpu/avx2",)"
      R"("bytes_before":64,"bytes_after":16})");
}

TEST(ResultJson, WritesNullForWhatHasNoMeaning) {
  ResultDocument document = SmallResult();
  document.table.reset();
  document.entropy.reset();
  document.layers = {LayerWithKept({2})};
  const auto json = nlohmann::json::parse(ResultJson(document));
  EXPECT_TRUE(json["table"].is_null());
  EXPECT_TRUE(json["entropy"].is_null());
  EXPECT_TRUE(json["layers"][0]["tau"].is_null());
  EXPECT_TRUE(json["layers"][0]["candidates"].is_null());
  EXPECT_FALSE(json["layers"][0].contains("entropy"));
}

TEST(ResultJson, ListsCountsPerHeadInScopeKvHead) {
  ResultDocument document = SmallResult();
  document.scope = "kv_head";
  document.layers = {LayerWithKept({2})};
  document.layers[0].entropy = 1.0;
  document.layers[0].entropy_bin = 3;
  const auto json = nlohmann::json::parse(ResultJson(document));
  EXPECT_EQ(json["layers"][0]["kept"], nlohmann::json::array({2}));
  EXPECT_EQ(json["layers"][0]["entropy_bin"], 3);
}

TEST(ResultFile, WritesSharedSetsAndGatheredRows) {
  const std::string k(2 * 2 * 4 * 2, 'k');
  const std::string v(2 * 2 * 3 * 2, 'v');
  const auto bytes = SerializeResult(ResultJson(SmallResult()), {{0, kSharedSet, kKept}},
                                     {{.layer = 0,
                                       .set = kSharedSet,
                                       .dtype = TensorDType::kF16,
                                       .num_kv_heads = 2,
                                       .num_tokens = 2,
                                       .k_head_dim = 4,
                                       .v_head_dim = 3,
                                       .k = AsBytes(k),
                                       .v = AsBytes(v)}});
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  const auto file = SafetensorsFile::Parse(AsBytes(*bytes), "r");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT(*ReadInts(**file, *(*file)->Find("layers.0.keep_indices")), ElementsAre(1, 6));
  EXPECT_EQ((*file)->Find("layers.0.keep_indices")->dtype, TensorDType::kI32);
  EXPECT_THAT((*file)->Find("layers.0.k")->shape, ElementsAre(2, 2, 4));
  EXPECT_THAT((*file)->Find("layers.0.v")->shape, ElementsAre(2, 2, 3));
  EXPECT_EQ(*(*file)->metadata("keepset"), ResultJson(SmallResult()));
}

TEST(ResultFile, WritesSetsPerHeadWithRaggedRows) {
  ResultDocument document = SmallResult();
  document.scope = "kv_head";
  document.layers = {LayerWithKept({2, 1})};
  const std::vector<int32_t> second = {7};
  const std::string k(8, 'k');
  const auto bytes = SerializeResult(ResultJson(document), {{0, 0, kKept}, {0, 1, second}},
                                     {{.layer = 0,
                                       .set = 1,
                                       .dtype = TensorDType::kF32,
                                       .num_tokens = 1,
                                       .k_head_dim = 2,
                                       .v_head_dim = 2,
                                       .k = AsBytes(k),
                                       .v = AsBytes(k)}});
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  const auto file = SafetensorsFile::Parse(AsBytes(*bytes), "r");
  EXPECT_THAT(*ReadInts(**file, *(*file)->Find("layers.0.keep_indices.1")), ElementsAre(7));
  EXPECT_THAT((*file)->Find("layers.0.k.1")->shape, ElementsAre(1, 2));
}

TEST(ResultFile, RefusesIndicesThatDoNotAscendOrLieBeyondThePrompt) {
  const std::string json = ResultJson(SmallResult());
  for (const std::vector<int32_t>& indices :
       {std::vector<int32_t>{6, 1}, {1, 1}, {1, 8}, {-1, 1}}) {
    ExpectRefused(json, {{0, kSharedSet, indices}}, {}, "keep_indices: element[");
  }
}

TEST(ResultFile, RefusesSetsThatDisagreeWithTheDocument) {
  const std::string json = ResultJson(SmallResult());
  const std::vector<int32_t> three = {1, 2, 3};
  ExpectRefused(json, {{0, kSharedSet, three}}, {}, "count=3, want 2");
  ExpectRefused(json, {}, {}, "sets=0, want 1");
  ExpectRefused(json, {{1, kSharedSet, kKept}}, {}, "no such set");
  ExpectRefused(json, {{0, 0, kKept}}, {}, "no such set");
}

TEST(ResultFile, RefusesGatheredRowsThatDisagreeWithTheirSet) {
  const std::string json = ResultJson(SmallResult());
  const std::string bytes(8, 'k');
  ResultGathered rows;
  rows.num_tokens = 1;
  rows.k_head_dim = 2;
  rows.v_head_dim = 2;
  rows.k = AsBytes(bytes);
  rows.v = AsBytes(bytes);
  ExpectRefused(json, {{0, kSharedSet, kKept}}, {rows}, "num_tokens=1");
  rows.num_tokens = 2;
  ExpectRefused(json, {{0, kSharedSet, kKept}}, {rows}, "bytes=8, want 16");
}

TEST(ResultFile, RefusesDocumentsThatAreNoResult) {
  ExpectRefused("{}", {}, {}, "format=(missing)");
  ExpectRefused(R"({"format":"keepset.result","seq_len":4,"layers":[{"kept":-1}]})", {}, {},
                "layers[0].kept=-1");
}

TEST(ResultFile, ARefusedWriteLeavesNoFile) {
  TemporaryDirectory directory;
  const std::string path = directory.Path("r.safetensors");
  EXPECT_FALSE(WriteResultFile(path, "{}", {}, {}).ok());
  EXPECT_EQ(SafetensorsFile::Open(path, ReadMode::kMap).status().code(),
            absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteResultFile(path, ResultJson(SmallResult()), {{0, kSharedSet, kKept}}, {}).ok());
  EXPECT_TRUE(SafetensorsFile::Open(path, ReadMode::kMap).ok());
}

}  // namespace
}  // namespace keepset::tables
