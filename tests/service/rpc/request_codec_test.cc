// Decoding by itself; what a whole server answers to bad requests is in
// tests/integration/malformed_request_test.cc.
#include "service/rpc/request_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;

class NoRegions final : public RegionSource {
 public:
  absl::StatusOr<const MappedRegion*> Find(absl::string_view /*region_id*/) override {
    return absl::NotFoundError("no region");
  }
};

// One layer, two heads, one KV head, dimension 2, four positions, one row.
v1::OperationSpec SmallSpec() {
  v1::OperationSpec wire;
  v1::ModelFingerprint* model = wire.mutable_model();
  model->set_architecture("x");
  model->set_num_layers(1);
  model->set_num_qo_heads(2);
  model->set_num_kv_heads(1);
  model->set_head_dim(2);
  wire.set_seq_len(4);
  wire.set_num_rows(1);
  wire.set_softmax_scale(1.0f);
  wire.set_kv_dtype(v1::DTYPE_F32);
  wire.set_policy("snapkv");
  return wire;
}

v1::LayerInput SmallLayer() {
  v1::LayerInput wire;
  wire.mutable_q_window()->set_dtype(v1::DTYPE_F32);
  wire.mutable_q_window()->mutable_data()->set_inline_(std::string(2 * 1 * 2 * 4, '\0'));
  for (v1::KvTensor* tensor : {wire.mutable_k(), wire.mutable_v()}) {
    tensor->set_dtype(v1::DTYPE_F32);
    tensor->mutable_data()->set_inline_(std::string(4 * 2 * 4, '\0'));
  }
  return wire;
}

absl::StatusOr<DecodedLayer> Decode(const v1::OperationSpec& spec, const v1::LayerInput& layer) {
  const absl::StatusOr<engine::OperationSpec> decoded = DecodeSpec(spec, {});
  EXPECT_TRUE(decoded.ok()) << decoded.status();
  NoRegions regions;
  return DecodeLayer(layer, *decoded, spec.gather(), spec.block_table(), regions);
}

TEST(DecodeLayer, ZeroStridesAreContiguous) {
  const v1::LayerInput wire = SmallLayer();
  const absl::StatusOr<DecodedLayer> layer = Decode(SmallSpec(), wire);
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_EQ(layer->observation.k.token_stride, 2);
  EXPECT_EQ(layer->observation.k.head_stride, 8);
  EXPECT_EQ(layer->observation.q_window.row_stride, 2);
  EXPECT_EQ(layer->observation.q_window.head_stride, 2);
}

TEST(DecodeLayer, InlineBytesAreBorrowed) {
  const v1::LayerInput wire = SmallLayer();
  const absl::StatusOr<DecodedLayer> layer = Decode(SmallSpec(), wire);
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_EQ(reinterpret_cast<const char*>(layer->observation.k.data),
            wire.k().data().inline_().data());
}

TEST(DecodeLayer, MissingTensorsStayAbsent) {
  v1::LayerInput wire = SmallLayer();
  wire.clear_v();
  const absl::StatusOr<DecodedLayer> layer = Decode(SmallSpec(), wire);
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_FALSE(layer->observation.v.present());
  EXPECT_FALSE(layer->observation.attn_tile.present());
  EXPECT_FALSE(layer->out_k.present());
}

TEST(DecodeLayer, ContiguousInlineBytesMustFitTheShapeExactly) {
  v1::LayerInput wire = SmallLayer();
  wire.mutable_k()->mutable_data()->mutable_inline_()->push_back('x');
  const absl::Status status = Decode(SmallSpec(), wire).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("33 inline bytes, want 32"));
}

TEST(DecodeLayer, LseIsReadInItsOwnBase) {
  v1::LayerInput wire = SmallLayer();
  const uint16_t half[] = {0x3c00, 0xc000};  // 1, -2
  wire.mutable_window_lse()->mutable_data()->set_inline_(half, sizeof(half));
  wire.mutable_window_lse()->set_dtype(v1::DTYPE_F16);
  for (const auto& [base, want] : {std::pair(v1::LSE_BASE_E, kernels::LogBase::kE),
                                   std::pair(v1::LSE_BASE_2, kernels::LogBase::kTwo)}) {
    wire.set_lse_base(base);
    const absl::StatusOr<DecodedLayer> layer = Decode(SmallSpec(), wire);
    ASSERT_TRUE(layer.ok()) << layer.status();
    const kernels::LseView& lse = layer->observation.window_lse;
    EXPECT_EQ(lse.base, want);
    EXPECT_EQ(lse.dtype, kernels::DType::kF16);
    EXPECT_EQ(std::memcmp(lse.data, half, sizeof(half)), 0);
  }
}

v1::LayerInput ColumnsLayer() {
  v1::LayerInput wire = SmallLayer();
  wire.clear_q_window();
  wire.mutable_column_stats()->set_dtype(v1::DTYPE_F32);
  wire.mutable_column_stats()->mutable_data()->set_inline_(std::string(2 * 4 * 4, '\0'));
  wire.set_column_reduction(v1::COLUMN_REDUCTION_SUM);
  return wire;
}

TEST(DecodeLayer, ColumnStatisticsAreOneValuePerHeadAndPosition) {
  const v1::LayerInput wire = ColumnsLayer();
  const absl::StatusOr<DecodedLayer> layer = Decode(SmallSpec(), wire);
  ASSERT_TRUE(layer.ok()) << layer.status();
  const kernels::ColumnsView& columns = layer->observation.column_stats;
  EXPECT_EQ(columns.num_qo_heads, 2);
  EXPECT_EQ(columns.seq_len, 4);
  EXPECT_EQ(columns.head_stride, 4);
  EXPECT_EQ(layer->observation.column_reduction, engine::ColumnReduction::kSum);
}

TEST(DecodeLayer, ColumnStatisticsSayWhatTheyAre) {
  v1::LayerInput wire = ColumnsLayer();
  wire.clear_column_reduction();
  EXPECT_THAT(std::string(Decode(SmallSpec(), wire).status().message()),
              HasSubstr("layer 0: column_stats: column_reduction=0, want COLUMN_REDUCTION_MEAN or "
                        "COLUMN_REDUCTION_SUM"));
}

TEST(DecodeLayer, RegionThatIsNotLeasedIsNotFound) {
  v1::LayerInput wire = SmallLayer();
  wire.mutable_k()->mutable_data()->mutable_region()->set_region_id("r");
  EXPECT_EQ(Decode(SmallSpec(), wire).status().code(), absl::StatusCode::kNotFound);
}

TEST(DecodeLayer, InlineDestinationIsRefused) {
  v1::OperationSpec spec = SmallSpec();
  spec.set_gather(v1::GATHER_DESTINATION);
  v1::LayerInput wire = SmallLayer();
  wire.mutable_destination()->set_capacity_tokens(2);
  *wire.mutable_destination()->mutable_k() = wire.k();
  const absl::Status status = Decode(spec, wire).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("read-write region"));
}

TEST(DecodeSpec, RopeIsReadFromItsJson) {
  v1::OperationSpec wire = SmallSpec();
  wire.mutable_model()->set_rope_json("{\"theta\": 10000.0}");
  const absl::StatusOr<engine::OperationSpec> spec = DecodeSpec(wire, {});
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->model.rope_theta, 10000.0);
}

TEST(DecodeSpec, AbsentPerplexityStaysAbsent) {
  EXPECT_FALSE(DecodeSpec(SmallSpec(), {})->ppl.has_value());
  v1::OperationSpec wire = SmallSpec();
  wire.set_ppl(0.0);
  EXPECT_TRUE(DecodeSpec(wire, {})->ppl.has_value());
}

TEST(DecodeSpec, ListsAreBounded) {
  const auto refusal = [](const v1::OperationSpec& wire) {
    return std::string(DecodeSpec(wire, {}).status().message());
  };
  v1::OperationSpec spans = SmallSpec();
  for (int i = 0; i < kMaxProtectSpans; ++i) spans.add_protect_spans()->set_end(1);
  EXPECT_EQ(refusal(spans), "");
  spans.add_protect_spans()->set_end(1);
  EXPECT_EQ(refusal(spans), "protect_spans has 4097 entries, want at most 4096");

  v1::OperationSpec logprobs = SmallSpec();
  for (int i = 0; i < 5; ++i) logprobs.add_window_logprobs(-1.0f);
  EXPECT_EQ(refusal(logprobs), "window_logprobs has 5 entries, want at most 4");

  v1::OperationSpec parameters = SmallSpec();
  for (int i = 0; i <= kMaxParameters; ++i) {
    (*parameters.mutable_parameters())[absl::StrCat("p", i)] = "1";
  }
  EXPECT_EQ(refusal(parameters), "parameters has 257 entries, want at most 256");
  EXPECT_EQ(DecodeQuestion(parameters, {}).status().message(), refusal(parameters));

  v1::OperationSpec rope = SmallSpec();
  rope.mutable_model()->set_rope_json(std::string(kMaxRopeJsonBytes + 1, ' '));
  EXPECT_EQ(refusal(rope), "model.rope_json: 65537 bytes, want at most 65536");
}

TEST(DecodeTableQuery, RelaxationsComeFromTheParameters) {
  v1::OperationSpec wire = SmallSpec();
  wire.mutable_table()->set_version("7");
  (*wire.mutable_parameters())["fingerprint_match"] = "shape";
  (*wire.mutable_parameters())["layer_match"] = "interpolate_depth";
  const absl::StatusOr<tables::TableQuery> query =
      DecodeTableQuery(wire, *DecodeSpec(wire, {}), "compilerkv");
  ASSERT_TRUE(query.ok()) << query.status();
  EXPECT_EQ(query->version, "7");
  EXPECT_EQ(query->kind, "compilerkv");
  EXPECT_EQ(query->fingerprint_match, tables::FingerprintMatch::kShape);
  EXPECT_EQ(query->layer_match, tables::LayerMatch::kInterpolateDepth);
}

TEST(DecodeTableQuery, UnknownRelaxationIsRefused) {
  v1::OperationSpec wire = SmallSpec();
  (*wire.mutable_parameters())["layer_match"] = "nearest";
  EXPECT_EQ(DecodeTableQuery(wire, *DecodeSpec(wire, {}), "compilerkv").status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(InlineBytes, CountsEveryTensorOfTheLayer) {
  EXPECT_EQ(InlineBytes(SmallLayer()), 16 + 32 + 32);
}

}  // namespace
}  // namespace keepset::service
