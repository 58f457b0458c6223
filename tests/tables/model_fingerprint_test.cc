#include "tables/model_fingerprint.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::HasSubstr;

constexpr char kWhole[] =
    R"({"architecture":"qwen2","num_layers":24,"num_qo_heads":14,"num_kv_heads":2,"head_dim":64,)"
    R"("rope":{"theta":1000000.0,"scaling":"none"},"revision":"abc"})";

ModelFingerprint WithRope(const std::string& rope_json) {
  ModelFingerprint model = SmallModel();
  model.rope_json = rope_json;
  return model;
}

absl::Status MatchFull(const ModelFingerprint& table, const ModelFingerprint& request) {
  return MatchFingerprint(table, request, FingerprintMatch::kFull, LayerMatch::kExact);
}

TEST(ModelFingerprint, ParsesAndWritesTheWholeObject) {
  const auto model = ParseModelFingerprint(kWhole, "m");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->num_qo_heads, 14);
  EXPECT_EQ(model->rope_theta, 1e6);
  EXPECT_EQ(*ParseModelFingerprint(ModelFingerprintJson(*model), "m"), *model);
}

TEST(ModelFingerprint, IgnoresUnknownKeys) {
  EXPECT_TRUE(ParseModelFingerprint(R"({"architecture":"a","num_layers":1,"num_qo_heads":1,)"
                                    R"("num_kv_heads":1,"head_dim":1,"vocab":7})",
                                    "m")
                  .ok());
}

TEST(ModelFingerprint, RefusesMissingCounts) {
  const auto model = ParseModelFingerprint(R"({"architecture":"a","num_layers":1})", "m");
  EXPECT_THAT(std::string(model.status().message()), HasSubstr("m: num_qo_heads=(missing)"));
}

TEST(ModelFingerprint, RefusesCountsOfOtherTypes) {
  for (const char* count : {"0", "-1", "1.5", "\"1\"", "18446744073709551615", "null"}) {
    EXPECT_FALSE(ParseModelFingerprint(std::string(R"({"num_qo_heads":1,"num_kv_heads":1,)") +
                                           R"("head_dim":1,"num_layers":)" + count + "}",
                                       "m")
                     .ok())
        << count;
  }
}

TEST(MatchFingerprint, NamesTheFirstFieldThatDiffers) {
  for (int64_t ModelFingerprint::*count :
       {&ModelFingerprint::num_layers, &ModelFingerprint::num_qo_heads,
        &ModelFingerprint::num_kv_heads, &ModelFingerprint::head_dim}) {
    ModelFingerprint request = SmallModel();
    request.*count += 1;
    EXPECT_EQ(MatchFull(SmallModel(), request).code(), absl::StatusCode::kFailedPrecondition);
  }
  ModelFingerprint request = SmallModel();
  request.architecture = "qwen2";
  EXPECT_THAT(std::string(MatchFull(SmallModel(), request).message()),
              HasSubstr("architecture is \"llama\" in the table and \"qwen2\" in the request"));
}

TEST(MatchFingerprint, ComparesRopeOnlyWhereBothStateIt) {
  EXPECT_TRUE(MatchFull(WithRope(R"({"theta":10000})"), SmallModel()).ok());
  EXPECT_TRUE(MatchFull(WithRope(R"({"theta":10000})"), WithRope(R"({"theta":10000.0})")).ok());
  EXPECT_FALSE(MatchFull(WithRope(R"({"theta":10000})"), WithRope(R"({"theta":500000})")).ok());
}

TEST(MatchFingerprint, ComparesRevisionOnlyWhereBothStateIt) {
  ModelFingerprint table = SmallModel();
  table.revision = "a";
  EXPECT_TRUE(MatchFull(table, SmallModel()).ok());
  ModelFingerprint request = SmallModel();
  request.revision = "b";
  EXPECT_FALSE(MatchFull(table, request).ok());
}

TEST(MatchFingerprint, ShapeIgnoresArchitectureRopeAndRevisionButNoCount) {
  ModelFingerprint table = WithRope(R"({"theta":1})");
  table.revision = "a";
  ModelFingerprint request = WithRope(R"({"theta":2})");
  request.revision = "b";
  request.architecture = "other";
  EXPECT_TRUE(MatchFingerprint(table, request, FingerprintMatch::kShape, LayerMatch::kExact).ok());
  request.head_dim = 9;
  EXPECT_FALSE(MatchFingerprint(table, request, FingerprintMatch::kShape, LayerMatch::kExact).ok());
}

TEST(ShapeRelaxations, NameEveryFieldThatDiffers) {
  ModelFingerprint table = WithRope(R"({"theta":1})");
  table.architecture = "one";
  ModelFingerprint request = WithRope(R"({"theta":2})");
  request.architecture = "other";
  table.revision = "a";
  EXPECT_EQ(
      ShapeRelaxations(table, request),
      (std::vector<std::string>{
          "fingerprint_match: architecture is \"one\" in the table and \"other\" in the request",
          "fingerprint_match: rope is {\"theta\":1} in the table and {\"theta\":2} in the "
          "request"}));
  EXPECT_EQ(ShapeRelaxations(table, table), std::vector<std::string>());
}

TEST(MatchFingerprint, InterpolationLetsOnlyTheLayerCountDiffer) {
  ModelFingerprint request = SmallModel();
  request.num_layers = 7;
  EXPECT_TRUE(MatchFingerprint(SmallModel(), request, FingerprintMatch::kFull,
                               LayerMatch::kInterpolateDepth)
                  .ok());
}

}  // namespace
}  // namespace keepset::tables
