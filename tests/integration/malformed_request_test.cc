// Every bad request is answered with its code and a message that names the field; the server then
// still serves a good one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;

struct BadRequest {
  std::string name;
  void (*spoil)(v1::CompressRequest& request);
  grpc::StatusCode code;
  std::string message_part;
};

void PutFloat(std::string* bytes, size_t index, float value) {
  std::memcpy(bytes->data() + index * sizeof(float), &value, sizeof(value));
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const BadRequest kBadRequests[] = {
    {"SeqLenZero", [](auto& r) { r.mutable_spec()->set_seq_len(0); },
     grpc::StatusCode::INVALID_ARGUMENT, "seq_len=0"},
    {"SeqLenBeyondTheLimit", [](auto& r) { r.mutable_spec()->set_seq_len(uint64_t{1} << 62); },
     grpc::StatusCode::INVALID_ARGUMENT, "seq_len="},
    {"MoreRowsThanPositions", [](auto& r) { r.mutable_spec()->set_num_rows(97); },
     grpc::StatusCode::INVALID_ARGUMENT, "num_rows"},
    {"BudgetZero", [](auto& r) { r.mutable_spec()->mutable_budget()->set_tokens(0); },
     grpc::StatusCode::INVALID_ARGUMENT, "budget"},
    {"BudgetMissingWithoutATable", [](auto& r) { r.mutable_spec()->clear_budget(); },
     grpc::StatusCode::INVALID_ARGUMENT, "budget"},
    {"KeptFractionNan",
     [](auto& r) { r.mutable_spec()->mutable_budget()->set_kept_fraction(std::nan("")); },
     grpc::StatusCode::INVALID_ARGUMENT, "kept_fraction"},
    {"UnknownPolicy", [](auto& r) { r.mutable_spec()->set_policy("best"); },
     grpc::StatusCode::NOT_FOUND, "best"},
    {"UnknownParameter", [](auto& r) { (*r.mutable_spec()->mutable_parameters())["x"] = "1"; },
     grpc::StatusCode::INVALID_ARGUMENT, "x"},
    {"ParameterOutOfRange",
     [](auto& r) { (*r.mutable_spec()->mutable_parameters())["kernel_size"] = "-1"; },
     grpc::StatusCode::INVALID_ARGUMENT, "kernel_size"},
    {"UnknownScope", [](auto& r) { r.mutable_spec()->set_scope(static_cast<v1::Scope>(9)); },
     grpc::StatusCode::INVALID_ARGUMENT, "scope=9"},
    {"UnknownMode", [](auto& r) { r.mutable_spec()->set_mode(static_cast<v1::Mode>(9)); },
     grpc::StatusCode::INVALID_ARGUMENT, "mode=9"},
    {"UnknownGather", [](auto& r) { r.mutable_spec()->set_gather(static_cast<v1::GatherMode>(9)); },
     grpc::StatusCode::INVALID_ARGUMENT, "gather=9"},
    {"ShadowGather",
     [](auto& r) {
       r.mutable_spec()->set_mode(v1::MODE_SHADOW);
       r.mutable_spec()->set_gather(v1::GATHER_INLINE);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "shadow"},
    {"HeadsNoMultipleOfKvHeads",
     [](auto& r) { r.mutable_spec()->mutable_model()->set_num_qo_heads(3); },
     grpc::StatusCode::INVALID_ARGUMENT, "num_qo_heads=3"},
    {"HeadDimBeyondSense",
     [](auto& r) { r.mutable_spec()->mutable_model()->set_head_dim(1 << 30); },
     grpc::StatusCode::INVALID_ARGUMENT, "head_dim="},
    {"RopeNoJson", [](auto& r) { r.mutable_spec()->mutable_model()->set_rope_json("{{"); },
     grpc::StatusCode::INVALID_ARGUMENT, "rope"},
    {"RowPositionsOfAnotherCount", [](auto& r) { r.mutable_spec()->add_row_positions(3); },
     grpc::StatusCode::INVALID_ARGUMENT, "row_positions"},
    {"ProtectedSpanBeyondThePrompt",
     [](auto& r) { r.mutable_spec()->add_protect_spans()->set_end(97); },
     grpc::StatusCode::INVALID_ARGUMENT, "protect_spans[0]"},
    {"MoreProtectedSpansThanTheLimit",
     [](auto& r) {
       for (int i = 0; i <= 4096; ++i) r.mutable_spec()->add_protect_spans()->set_end(1);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "protect_spans has 4097 entries, want at most 4096"},
    {"MoreLayersThanAModelHas",
     [](auto& r) {
       while (r.layers_size() <= 1024) r.add_layers();
     },
     grpc::StatusCode::INVALID_ARGUMENT, "layers has 1025 entries, want at most 1024"},
    {"MoreProtectedThanBudget", [](auto& r) { r.mutable_spec()->set_protect_sink(25); },
     grpc::StatusCode::INVALID_ARGUMENT, "protect"},
    {"KvDTypeMissing", [](auto& r) { r.mutable_spec()->clear_kv_dtype(); },
     grpc::StatusCode::INVALID_ARGUMENT, "kv_dtype=0"},
    {"TensorDTypeUnknown",
     [](auto& r) { r.mutable_layers(1)->mutable_k()->set_dtype(static_cast<v1::DType>(7)); },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 1: k: dtype=7"},
    {"TensorDTypeOfAnotherSize",
     [](auto& r) { r.mutable_layers(0)->mutable_q_window()->set_dtype(v1::DTYPE_F16); },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0: q_window"},
    {"InlineBytesShort",
     [](auto& r) {
       r.mutable_layers(2)->mutable_k()->mutable_data()->mutable_inline_()->resize(64);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 2: k"},
    {"InlineBytesEmpty",
     [](auto& r) { r.mutable_layers(2)->mutable_k()->mutable_data()->mutable_inline_()->clear(); },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 2: k"},
    {"StrideBeyondTheBytes",
     [](auto& r) { r.mutable_layers(0)->mutable_k()->set_head_stride(1 << 20); },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0: k"},
    {"StrideThatOverflows",
     [](auto& r) { r.mutable_layers(0)->mutable_k()->set_token_stride(~uint64_t{0}); },
     grpc::StatusCode::INVALID_ARGUMENT, "token_stride"},
    {"OneStrideOfTwo", [](auto& r) { r.mutable_layers(0)->mutable_k()->set_token_stride(0); },
     grpc::StatusCode::INVALID_ARGUMENT, "want both"},
    {"PagedWithoutBlockTable",
     [](auto& r) {
       r.mutable_layers(0)->mutable_k()->set_block_size(16);
       r.mutable_layers(0)->mutable_k()->set_block_stride(512);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "block_table has 0 entries"},
    {"BlockIdOutOfBounds",
     [](auto& r) {
       v1::KvTensor* k = r.mutable_layers(0)->mutable_k();
       k->set_block_size(16);
       k->set_block_stride(512);
       k->set_head_stride(16);
       k->set_token_stride(32);
       for (int i = 0; i < 6; ++i) k->add_block_table(i == 5 ? 1 << 30 : i);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0: k"},
    {"BlockIdNegative",
     [](auto& r) {
       v1::KvTensor* k = r.mutable_layers(0)->mutable_k();
       k->set_block_size(16);
       k->set_block_stride(512);
       k->set_head_stride(16);
       k->set_token_stride(32);
       for (int i = 0; i < 6; ++i) k->add_block_table(i == 0 ? -1 : i);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0: k"},
    {"KeysMissing", [](auto& r) { r.mutable_layers(0)->clear_k(); },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0"},
    {"ValuesMissingForAGather",
     [](auto& r) {
       r.mutable_spec()->set_gather(v1::GATHER_INLINE);
       r.mutable_layers(0)->clear_v();
     },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0: v is missing"},
    {"DestinationMissing", [](auto& r) { r.mutable_spec()->set_gather(v1::GATHER_DESTINATION); },
     grpc::StatusCode::INVALID_ARGUMENT, "destination.capacity_tokens=0"},
    {"LseWithoutItsBase",
     [](auto& r) {
       v1::RowsTensor* lse = r.mutable_layers(0)->mutable_window_lse();
       lse->mutable_data()->set_inline_(std::string(4 * 8 * 4, '\0'));
       lse->set_dtype(v1::DTYPE_F32);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "lse_base=0"},
    {"NanInQueries",
     [](auto& r) {
       PutFloat(r.mutable_layers(0)->mutable_q_window()->mutable_data()->mutable_inline_(), 3,
                kNan);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0"},
    {"InfinityInKeys",
     [](auto& r) {
       PutFloat(r.mutable_layers(1)->mutable_k()->mutable_data()->mutable_inline_(), 5, INFINITY);
     },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 1"},
    {"LayerMissing", [](auto& r) { r.mutable_layers()->RemoveLast(); },
     grpc::StatusCode::FAILED_PRECONDITION, "layer 2"},
    {"LayerTwice", [](auto& r) { r.mutable_layers(1)->set_layer(0); },
     grpc::StatusCode::INVALID_ARGUMENT, "layer 0"},
    {"LayersOutOfOrder", [](auto& r) { r.mutable_layers()->SwapElements(0, 1); },
     grpc::StatusCode::INVALID_ARGUMENT, "want layer 0"},
    {"LayerBeyondTheModel", [](auto& r) { r.mutable_layers(2)->set_layer(3); },
     grpc::StatusCode::INVALID_ARGUMENT, "layer=3"},
    {"TableMissing", [](auto& r) { r.mutable_spec()->set_policy("compilerkv"); },
     grpc::StatusCode::NOT_FOUND, "compilerkv"},
};

class MalformedRequest : public ::testing::TestWithParam<BadRequest> {};

TEST_P(MalformedRequest, IsRefusedAndTheServerGoesOn) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest good = WireRequest(prompt, "snapkv", kBudget);
  v1::CompressRequest bad = good;
  GetParam().spoil(bad);
  const grpc::Status status = Compress(server, bad, nullptr);
  EXPECT_EQ(status.error_code(), GetParam().code) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr(GetParam().message_part));
  EXPECT_TRUE(Compress(server, good, nullptr).ok());
  EXPECT_TRUE(Eventually([&] { return server.server().operations_running() == 0; }));
}

INSTANTIATE_TEST_SUITE_P(All, MalformedRequest, ::testing::ValuesIn(kBadRequests),
                         [](const auto& info) { return info.param.name; });

TEST(Compress, OversizeInlineNamesTheLimit) {
  TestServer server("limits { max_inline_bytes: 20000 }");
  const fakes::SyntheticPrompt prompt({});
  const grpc::Status status = Compress(server, WireRequest(prompt, "snapkv", kBudget), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("want at most 20000"));
}

TEST(Compress, OversizeGatherNamesTheLimit) {
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "tova", 90);
  request.mutable_spec()->set_gather(v1::GATHER_INLINE);
  TestServer server("limits { max_inline_bytes: 50000 }");
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const grpc::Status status = Compress(server, ToRegion(request, session.id(), region), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("gathered bytes"));
}

}  // namespace
}  // namespace keepset::integration
