#include "clients/cpp/wire_codec.h"

#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kSeqLen = 8;

OperationSpec SmallSpec() {
  OperationSpec spec;
  spec.model = {"llama", 1, 4, 2, 4, "", ""};
  spec.seq_len = kSeqLen;
  spec.kv_dtype = DType::kF32;
  return spec;
}

void SetIndices(const std::vector<int32_t>& indices, v1::KeepSet* set) {
  set->set_indices(indices.data(), indices.size() * sizeof(int32_t));
  set->set_kept(indices.size());
}

v1::OperationResult Reply(const std::vector<int32_t>& indices) {
  v1::OperationResult reply;
  reply.set_outcome(v1::OUTCOME_COMPRESSED);
  reply.set_seq_len(kSeqLen);
  SetIndices(indices, reply.add_layers()->add_sets());
  return reply;
}

absl::StatusOr<OperationResult> Decode(v1::OperationResult reply) {
  return DecodeResult(reply, MakeReplyContext(SmallSpec()));
}

bool NoRegion(const void*, int64_t, v1::RegionSlice*) { return false; }

TEST(DecodeResult, ReadsKeepIndices) {
  const auto result = Decode(Reply({1, 4, 7}));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->layers[0].sets[0].keep_indices, ElementsAre(1, 4, 7));
}

TEST(DecodeResult, ExpandsAllPositions) {
  v1::OperationResult reply = Reply({});
  reply.mutable_layers(0)->mutable_sets(0)->set_all(true);
  reply.mutable_layers(0)->mutable_sets(0)->set_kept(kSeqLen);
  const auto result = Decode(reply);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->layers[0].sets[0].keep_indices, ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
}

TEST(DecodeResult, RefusesIndicesThatDoNotAscend) {
  EXPECT_EQ(Decode(Reply({4, 4})).status().code(), absl::StatusCode::kInternal);
}

TEST(DecodeResult, RefusesIndicesBeyondThePrompt) {
  const auto result = Decode(Reply({2, kSeqLen}));
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("layer 0"));
}

TEST(DecodeResult, RefusesTornIndexBytes) {
  v1::OperationResult reply = Reply({1, 2});
  reply.mutable_layers(0)->mutable_sets(0)->mutable_indices()->pop_back();
  EXPECT_EQ(Decode(reply).status().code(), absl::StatusCode::kInternal);
}

TEST(DecodeResult, RefusesAMissingLayer) {
  v1::OperationResult reply = Reply({1});
  reply.clear_layers();
  EXPECT_EQ(Decode(reply).status().code(), absl::StatusCode::kInternal);
}

TEST(DecodeResult, RefusesASetCountThatIsNeitherOneNorTheHeads) {
  v1::OperationResult reply = Reply({1});
  SetIndices({1}, reply.mutable_layers(0)->add_sets());
  SetIndices({1}, reply.mutable_layers(0)->add_sets());
  EXPECT_EQ(Decode(reply).status().code(), absl::StatusCode::kInternal);
}

TEST(DecodeResult, RefusesAnUnknownOutcome) {
  v1::OperationResult reply = Reply({1});
  reply.set_outcome(v1::OUTCOME_UNSPECIFIED);
  EXPECT_EQ(Decode(reply).status().code(), absl::StatusCode::kInternal);
}

TEST(DecodeResult, ViewsRaggedInlineRowsHeadByHead) {
  OperationSpec spec = SmallSpec();
  spec.gather = GatherMode::kInline;
  v1::OperationResult reply = Reply({0});
  SetIndices({1, 2}, reply.mutable_layers(0)->add_sets());
  constexpr int64_t kRowBytes = 4 * 4;
  reply.mutable_layers(0)->set_k(std::string(3 * kRowBytes, 'k'));
  reply.mutable_layers(0)->set_v(std::string(3 * kRowBytes, 'v'));
  const auto result = DecodeResult(reply, MakeReplyContext(spec));
  ASSERT_TRUE(result.ok()) << result.status();
  const std::vector<GatheredHead>& heads = result->layers[0].gathered;
  ASSERT_EQ(heads.size(), 2);
  EXPECT_EQ(heads[0].num_tokens, 1);
  EXPECT_EQ(heads[1].num_tokens, 2);
  EXPECT_EQ(heads[1].k - heads[0].k, kRowBytes);
}

TEST(DecodeResult, RowsGatheredInPlaceAreTheFrontOfTheTensors) {
  OperationSpec spec = SmallSpec();
  spec.gather = GatherMode::kInPlace;
  const float cache[2 * 2 * kSeqLen * 4] = {};
  LayerInput layer;
  layer.k.data = cache;
  layer.v.data = cache + 2 * kSeqLen * 4;
  ReplyContext context = MakeReplyContext(spec);
  NoteDestination(layer, context);
  v1::OperationResult reply = Reply({1, 4, 7});
  const auto result = DecodeResult(reply, context);
  ASSERT_TRUE(result.ok()) << result.status();
  const std::vector<GatheredHead>& heads = result->layers[0].gathered;
  ASSERT_EQ(heads.size(), 2);
  EXPECT_EQ(heads[1].num_tokens, 3);
  EXPECT_EQ(heads[1].k, reinterpret_cast<const std::byte*>(cache + kSeqLen * 4));
  EXPECT_EQ(heads[0].v, static_cast<const std::byte*>(layer.v.data));
}

TEST(DecodeResult, RefusesInlineRowsOfAnotherSize) {
  v1::OperationResult reply = Reply({0, 1});
  reply.mutable_layers(0)->set_k("short");
  reply.mutable_layers(0)->set_v("short");
  EXPECT_EQ(Decode(reply).status().code(), absl::StatusCode::kInternal);
}

TEST(DecodeResult, ReadsWhatTheShadowTableWouldKeep) {
  v1::OperationResult reply = Reply({1});
  EXPECT_FALSE(Decode(reply)->shadow.has_value());
  reply.mutable_shadow()->mutable_table()->set_version("2");
  reply.mutable_shadow()->set_kept_overlap(0.5);
  reply.mutable_shadow()->set_would_be_bytes(640);
  const auto result = Decode(reply);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_TRUE(result->shadow.has_value());
  EXPECT_EQ(result->shadow->table.version, "2");
  EXPECT_EQ(result->shadow->kept_overlap, 0.5);
  EXPECT_EQ(result->shadow->would_be_bytes, 640);
}

TEST(DecodeResult, ReadsWhyThereIsNoShadow) {
  v1::OperationResult reply = Reply({1});
  reply.mutable_shadow()->set_error("no such table");
  const auto result = Decode(reply);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->shadow->error, "no such table");
}

TEST(DecodeResult, RefusesAnOverlapThatIsNoShare) {
  for (const double overlap : {-0.1, 1.5, std::nan("")}) {
    v1::OperationResult reply = Reply({1});
    reply.mutable_shadow()->set_kept_overlap(overlap);
    EXPECT_EQ(Decode(reply).status().code(), absl::StatusCode::kInternal) << overlap;
  }
}

TEST(EncodeSpec, SendsAShadowTableOnlyWhenAsked) {
  OperationSpec spec = SmallSpec();
  v1::OperationSpec plain;
  EncodeSpec(spec, &plain);
  EXPECT_FALSE(plain.has_shadow_table());
  // Without a name: of the line that decides.
  spec.shadow_table = TablePin{"", "", "", "canary"};
  v1::OperationSpec shadowed;
  EncodeSpec(spec, &shadowed);
  EXPECT_EQ(shadowed.shadow_table().alias(), "canary");
  EXPECT_FALSE(shadowed.has_table());
}

TEST(EncodeSpec, StatesHowLayersAttend) {
  OperationSpec spec = SmallSpec();
  spec.layer_groups.push_back({{0, 2}});
  spec.layer_groups.push_back({{1}, LayerGroup::Attention::kSlidingWindow, 512, true});
  v1::OperationSpec out;
  EncodeSpec(spec, &out);
  ASSERT_EQ(out.layer_groups_size(), 2);
  EXPECT_EQ(out.layer_groups(0).attention(), v1::ATTENTION_KIND_FULL);
  EXPECT_THAT(out.layer_groups(0).layers(), ElementsAre(0, 2));
  EXPECT_EQ(out.layer_groups(1).attention(), v1::ATTENTION_KIND_SLIDING_WINDOW);
  EXPECT_EQ(out.layer_groups(1).window(), 512);
  EXPECT_TRUE(out.layer_groups(1).left_out());
}

TEST(EncodeLayer, RefusesKOutsideRegionsWhenOnlyRegionsAreAllowed) {
  const float data[4] = {};
  LayerInput layer;
  layer.k.data = data;
  layer.k.size_bytes = sizeof(data);
  v1::LayerInput out;
  EXPECT_EQ(EncodeLayer(layer, NoRegion, KvPlacement::kRegionsOnly, &out).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(EncodeLayer, SendsQueriesInlineEvenWithRegionsOnly) {
  const float data[4] = {};
  LayerInput layer;
  layer.q_window.data = data;
  layer.q_window.size_bytes = sizeof(data);
  v1::LayerInput out;
  ASSERT_TRUE(EncodeLayer(layer, NoRegion, KvPlacement::kRegionsOnly, &out).ok());
  EXPECT_EQ(out.q_window().data().inline_().size(), sizeof(data));
}

TEST(EncodeLayer, StatesWhatColumnStatisticsHold) {
  const float data[4] = {};
  LayerInput layer;
  layer.column_stats.data = data;
  layer.column_stats.size_bytes = sizeof(data);
  for (const auto& [reduction, want] :
       {std::pair(ColumnReduction::kMean, v1::COLUMN_REDUCTION_MEAN),
        std::pair(ColumnReduction::kSum, v1::COLUMN_REDUCTION_SUM)}) {
    layer.column_reduction = reduction;
    v1::LayerInput out;
    ASSERT_TRUE(EncodeLayer(layer, NoRegion, KvPlacement::kAnywhere, &out).ok());
    EXPECT_EQ(out.column_stats().data().inline_().size(), sizeof(data));
    EXPECT_EQ(out.column_reduction(), want);
  }
}

TEST(EncodeLayer, StatesTheBaseOfALogSumExp) {
  const float data[4] = {};
  LayerInput layer;
  layer.window_lse.data = data;
  layer.window_lse.size_bytes = sizeof(data);
  for (const auto& [base, want] :
       {std::pair(LseBase::kE, v1::LSE_BASE_E), std::pair(LseBase::kTwo, v1::LSE_BASE_2)}) {
    layer.lse_base = base;
    v1::LayerInput out;
    ASSERT_TRUE(EncodeLayer(layer, NoRegion, KvPlacement::kAnywhere, &out).ok());
    EXPECT_EQ(out.lse_base(), want);
  }
}

}  // namespace
}  // namespace keepset::client
