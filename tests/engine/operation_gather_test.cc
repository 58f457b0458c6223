// What an operation moves after its decision.
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "engine/operation.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/engine/operation_fixture.h"
#include "tests/fakes/gated_backend.h"

namespace keepset::engine {
namespace {

using ::testing::HasSubstr;

class OperationGather : public OperationTest {};

// A destination of `rows` contiguous rows per head.
kernels::MutableKvView Destination(std::vector<float>& data, int64_t heads, int64_t rows,
                                   int64_t head_dim) {
  data.assign(heads * rows * head_dim, -1.0f);
  kernels::MutableKvView view;
  view.data = reinterpret_cast<std::byte*>(data.data());
  view.size_bytes = static_cast<int64_t>(data.size() * sizeof(float));
  view.num_kv_heads = heads;
  view.seq_len = rows;
  view.head_dim = head_dim;
  view.head_stride = rows * head_dim;
  view.token_stride = head_dim;
  return view;
}

TEST_F(OperationGather, GatherMovesTheKeptRowsOfEachHead) {
  const auto operation = Observed(Spec("knorm", 10));
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  ASSERT_EQ(*operation->GatherRows(1), 10);
  std::vector<float> k;
  std::vector<float> v;
  const auto out_k = Destination(k, 2, 10, 16);
  const auto out_v = Destination(v, 2, 10, 16);
  const LayerObservation source = prompt_.observation(1);
  ASSERT_TRUE(operation->Gather(1, source.k, source.v, out_k, out_v).ok());
  for (int64_t head = 0; head < 2; ++head) {
    for (int64_t i = 0; i < 10; ++i) {
      const int64_t t = (*result)->layers[1].keep_indices[head][i];
      for (int64_t c = 0; c < 16; ++c) {
        EXPECT_EQ(k[(head * 10 + i) * 16 + c], static_cast<float>(prompt_.k(1, head, t, c)));
        EXPECT_EQ(v[(head * 10 + i) * 16 + c], static_cast<float>(prompt_.v(1, head, t, c)));
      }
    }
  }
}

// [2, 96, 16], element i of it is i.
kernels::MutableKvView Cache(std::vector<float>& data) {
  const kernels::MutableKvView view = Destination(data, 2, 96, 16);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  return view;
}

TEST_F(OperationGather, GatherInPlaceMovesTheKeptRowsToTheFront) {
  const auto operation = Observed(Spec("knorm", 10));
  const auto result = operation->Finish();
  ASSERT_TRUE(result.ok());
  std::vector<float> k;
  std::vector<float> v;
  const auto in_k = Cache(k);
  const auto in_v = Cache(v);
  ASSERT_TRUE(operation->GatherInPlace(1, in_k, in_v).ok());
  for (int64_t head = 0; head < 2; ++head) {
    for (int64_t t = 0; t < 96; ++t) {
      const int64_t from = t < 10 ? (*result)->layers[1].keep_indices[head][t] : t;
      for (int64_t c = 0; c < 16; ++c) {
        const int64_t at = (head * 96 + t) * 16 + c;
        EXPECT_EQ(k[at], static_cast<float>((head * 96 + from) * 16 + c));
        EXPECT_EQ(v[at], k[at]);
      }
    }
  }
}

TEST_F(OperationGather, GatherInPlaceOfAKeptFullResultMovesNothing) {
  const auto operation = Observed(Spec("knorm", 200));
  ASSERT_EQ((*operation->Finish())->outcome, Outcome::kKeptFull);
  std::vector<float> k;
  std::vector<float> v;
  const auto in_k = Cache(k);
  const auto in_v = Cache(v);
  const std::vector<float> before = k;
  ASSERT_TRUE(operation->GatherInPlace(0, in_k, in_v).ok());
  EXPECT_EQ(k, before);
  EXPECT_EQ(v, before);
}

TEST_F(OperationGather, GatherInPlaceOfOtherShapesIsRefused) {
  const auto operation = Observed(Spec("knorm", 10));
  ASSERT_TRUE(operation->Finish().ok());
  std::vector<float> k;
  std::vector<float> v;
  const auto in_k = Cache(k);
  auto in_v = Cache(v);
  in_v.seq_len = 95;
  const std::vector<float> before = k;
  const absl::Status status = operation->GatherInPlace(0, in_k, in_v);
  EXPECT_EQ(status.message(), "layer 0: gather in place of v: seq_len=95, want 96");
  EXPECT_EQ(k, before);
}

// What was said of the decision is not said of the cache as it is, nor anything twice.
TEST_F(OperationGather, AResultThatIsTakenBackSaysNothingOfTheDecision) {
  OperationSpec spec = Spec("compilerkv", 10);
  fakes::TableSample sample;
  sample.ppl_edges = {5.0f, 10.0f, 30.0f};
  spec.table = fakes::MakeTable(prompt_.model(), sample);
  spec.parameters = {{"missing_ppl", "median"}};
  spec.on_short_memory = OnShortMemory::kKeepFull;
  fakes::Gate gate;
  fakes::GatedBackend backend(std::move(*kernels::NewBackend("cpu", {.num_threads = 1})), gate);
  auto operation = *Operation::Begin(spec, bench_.policies(), backend, bench_.clock());
  for (int64_t layer = 0; layer < 3; ++layer) ASSERT_TRUE(Observe(*operation, layer).ok());
  const OperationResult decided = **operation->Finish();
  ASSERT_TRUE(decided.has_candidates);
  gate.FailReservations(absl::ResourceExhaustedError("none"));
  std::vector<float> k;
  std::vector<float> v;
  EXPECT_FALSE(operation->ReserveInPlace({{0, Cache(k), Cache(v)}}).ok());
  const OperationResult& full = operation->FinishKeptFull(Reason::kShed);
  EXPECT_EQ(full.reason, Reason::kShed);
  EXPECT_EQ(full.defaulted_inputs, std::vector<std::string>{"ppl"});
  EXPECT_EQ(full.relaxed, decided.relaxed);
  EXPECT_FALSE(full.has_candidates);
  EXPECT_EQ(full.bytes_after, full.bytes_before);
}

TEST_F(OperationGather, GatherBeforeFinishIsRefused) {
  const auto operation = Observed(Spec("knorm", 10));
  EXPECT_EQ(operation->GatherRows(0).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(operation->Gather(0, {}, {}, {}, {}).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(OperationGather, GatherIntoTooSmallADestinationIsRefused) {
  const auto operation = Observed(Spec("knorm", 10));
  ASSERT_TRUE(operation->Finish().ok());
  std::vector<float> k;
  std::vector<float> v;
  const auto out_k = Destination(k, 2, 9, 16);
  const auto out_v = Destination(v, 2, 9, 16);
  const LayerObservation source = prompt_.observation(0);
  const absl::Status status = operation->Gather(0, source.k, source.v, out_k, out_v);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("layer 0: gather of k"));
}

TEST_F(OperationGather, GatherWithoutValuesIsRefused) {
  const auto operation = Observed(Spec("knorm", 10));
  ASSERT_TRUE(operation->Finish().ok());
  std::vector<float> k;
  const auto out_k = Destination(k, 2, 10, 16);
  EXPECT_EQ(operation->Gather(0, prompt_.observation(0).k, {}, out_k, {}).message(),
            "layer 0: gather of v: missing source");
}

TEST_F(OperationGather, GatherOfALayerThatIsNotThereIsRefused) {
  const auto operation = Observed(Spec("knorm", 10));
  ASSERT_TRUE(operation->Finish().ok());
  EXPECT_EQ(operation->GatherRows(3).status().message(), "gather: layer 3, want 0..2");
}

}  // namespace
}  // namespace keepset::engine
