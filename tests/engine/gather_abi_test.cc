// keepset.h: what a gather that finds no memory, or no device, leaves of the result.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "engine/c_abi/handles.h"
#include "engine/keepset.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/fakes/gated_backend.h"

namespace keepset::engine {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

constexpr char kModel[] =
    R"({"architecture": "Moves", "num_layers": 2, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8})";
constexpr int64_t kLayers = 2;
constexpr int64_t kHeads = 2;
constexpr int64_t kSeqLen = 24;
constexpr int64_t kDim = 8;
constexpr int64_t kBudget = 6;

absl::Status NoMemory() { return absl::ResourceExhaustedError("no memory for rows"); }

// [2, rows, 8] in order, contiguous.
keepset_kv_view View(std::vector<float>& data, int64_t rows) {
  keepset_kv_view view = {};
  view.data = data.data();
  view.size_bytes = static_cast<int64_t>(data.size() * sizeof(float));
  view.dtype = KEEPSET_F32;
  view.num_kv_heads = kHeads;
  view.seq_len = rows;
  view.head_dim = kDim;
  view.head_stride = rows * kDim;
  view.token_stride = kDim;
  return view;
}

// A finished operation of knorm, one set for both heads; its rows have not moved.
class GatherAbi : public ::testing::Test {
 protected:
  enum class Short { kFails, kKeepsFull };

  GatherAbi() {
    engine_.backend = std::make_unique<fakes::GatedBackend>(
        std::move(*kernels::NewBackend("cpu", {.num_threads = 1})), gate_);
    engine_.policies = NewBuiltinPolicyRegistry();
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      std::vector<float>& cache = caches_.emplace_back(kHeads * kSeqLen * kDim);
      for (size_t i = 0; i < cache.size(); ++i) {
        cache[i] = static_cast<float>((i * 7 + static_cast<size_t>(layer)) % 31);
      }
    }
    k_ = caches_;
    v_ = caches_;
  }
  ~GatherAbi() override { keepset_operation_destroy(operation_); }

  void Decide(Short on_short_memory) {
    keepset_operation_spec spec = {};
    spec.struct_size = sizeof(spec);
    spec.model_json = kModel;
    spec.seq_len = kSeqLen;
    spec.kv_dtype = KEEPSET_F32;
    spec.policy = "knorm";
    spec.scope = "layer_equal";
    spec.budget_kind = KEEPSET_BUDGET_TOKENS;
    spec.budget = kBudget;
    spec.ppl = std::nan("");
    spec.keep_full_on_short_memory = on_short_memory == Short::kKeepsFull ? 1 : 0;
    ASSERT_EQ(keepset_operation_begin(&engine_, &spec, &operation_), KEEPSET_OK)
        << keepset_last_error();
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      keepset_layer_observation observation = {};
      observation.struct_size = sizeof(observation);
      observation.k = View(k_[layer], kSeqLen);
      ASSERT_EQ(keepset_operation_observe(operation_, layer, &observation), KEEPSET_OK)
          << keepset_last_error();
    }
    ASSERT_EQ(keepset_operation_finish(operation_, &result_), KEEPSET_OK);
    ASSERT_EQ(Outcome(), "compressed");
  }

  keepset_status Gather(int64_t layer) {
    out_.assign(kHeads * kBudget * kDim, -1.0f);
    std::vector<float> out_v = out_;
    const keepset_kv_view k = View(k_[layer], kSeqLen);
    const keepset_kv_view v = View(v_[layer], kSeqLen);
    const keepset_kv_view k_out = View(out_, kBudget);
    const keepset_kv_view v_out = View(out_v, kBudget);
    return keepset_operation_gather(operation_, layer, &k, &v, &k_out, &v_out);
  }
  keepset_status GatherInPlace(int64_t layer) {
    const keepset_kv_view k = View(k_[layer], kSeqLen);
    const keepset_kv_view v = View(v_[layer], kSeqLen);
    return keepset_operation_gather_in_place(operation_, layer, &k, &v);
  }
  keepset_status ReserveInPlace() {
    const keepset_kv_view k = View(k_[0], kSeqLen);
    const keepset_kv_view v = View(v_[0], kSeqLen);
    const keepset_layer_in_place one = {sizeof(one), 0, &k, &v};
    const keepset_layer_in_place* const layers[] = {&one};
    return keepset_operation_reserve_in_place(operation_, layers, 1);
  }

  std::string Outcome() const { return keepset_result_outcome(result_); }
  std::string Reason() const { return keepset_result_reason(result_); }
  std::string Json() const { return keepset_result_json(result_); }
  int64_t Kept(int64_t layer) const {
    const int32_t* indices = nullptr;
    int64_t count = 0;
    EXPECT_EQ(keepset_result_keep_indices(result_, layer, 0, &indices, &count), KEEPSET_OK);
    return count;
  }
  void ExpectKeptFull(const std::string& reason) const {
    EXPECT_EQ(Outcome(), "kept_full");
    EXPECT_EQ(Reason(), reason);
    EXPECT_THAT(Json(), HasSubstr("\"outcome\":\"kept_full\",\"reason\":\"" + reason + "\""));
    for (int64_t layer = 0; layer < kLayers; ++layer) EXPECT_EQ(Kept(layer), kSeqLen);
    EXPECT_EQ(k_, caches_);
    EXPECT_EQ(v_, caches_);
  }
  void ExpectCompressed() const {
    EXPECT_EQ(Outcome(), "compressed");
    EXPECT_THAT(Json(), HasSubstr("\"outcome\":\"compressed\""));
    EXPECT_EQ(Kept(0), kBudget);
  }

  fakes::Gate gate_;
  keepset_engine engine_;
  std::vector<std::vector<float>> caches_;  // as they were
  std::vector<std::vector<float>> k_;
  std::vector<std::vector<float>> v_;
  std::vector<float> out_;
  keepset_operation* operation_ = nullptr;
  const keepset_result* result_ = nullptr;
};

TEST_F(GatherAbi, WithoutMemoryEverythingIsKeptWhereThatIsAskedFor) {
  Decide(Short::kKeepsFull);
  ASSERT_EQ(Gather(0), KEEPSET_OK) << keepset_last_error();
  gate_.AnswerGather(0, NoMemory);
  EXPECT_EQ(Gather(1), KEEPSET_RESOURCE_EXHAUSTED);
  EXPECT_THAT(keepset_last_error(), HasSubstr("no memory for rows"));
  EXPECT_THAT(out_, Each(-1.0f));
  ExpectKeptFull("shed");
}

TEST_F(GatherAbi, WithoutMemoryTheDecisionStandsWhereNothingIsAskedFor) {
  Decide(Short::kFails);
  gate_.AnswerGather(0, NoMemory);
  EXPECT_EQ(Gather(0), KEEPSET_RESOURCE_EXHAUSTED);
  ExpectCompressed();
  EXPECT_EQ(Gather(0), KEEPSET_OK);
}

TEST_F(GatherAbi, HostMemoryThatRunsOutIsNoMemory) {
  Decide(Short::kKeepsFull);
  gate_.AnswerGather(1, []() -> absl::Status { throw std::bad_alloc(); });
  EXPECT_EQ(Gather(0), KEEPSET_RESOURCE_EXHAUSTED);
  ExpectKeptFull("shed");
}

TEST_F(GatherAbi, GatherOfSeveralLayersKeepsEverythingToo) {
  Decide(Short::kKeepsFull);
  gate_.AnswerGather(0, NoMemory);
  std::vector<float> out(kHeads * kBudget * kDim);
  const keepset_kv_view k = View(k_[0], kSeqLen);
  const keepset_kv_view v = View(v_[0], kSeqLen);
  const keepset_kv_view to = View(out, kBudget);
  const keepset_layer_gather one = {sizeof(one), 0, &k, &v, &to, &to};
  const keepset_layer_gather* const layers[] = {&one};
  EXPECT_EQ(keepset_operation_gather_layers(operation_, layers, 1), KEEPSET_RESOURCE_EXHAUSTED);
  ExpectKeptFull("shed");
}

TEST_F(GatherAbi, WhatWasBorrowedBeforeStaysReadable) {
  Decide(Short::kKeepsFull);
  const int32_t* indices = nullptr;
  int64_t count = 0;
  ASSERT_EQ(keepset_result_keep_indices(result_, 1, 0, &indices, &count), KEEPSET_OK);
  const std::vector<int32_t> before(indices, indices + count);
  const char* const json = keepset_result_json(result_);
  gate_.AnswerGather(0, NoMemory);
  ASSERT_EQ(Gather(0), KEEPSET_RESOURCE_EXHAUSTED);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), indices));
  EXPECT_THAT(json, HasSubstr("\"outcome\":\"compressed\""));
  const keepset_result* again = nullptr;
  ASSERT_EQ(keepset_operation_finish(operation_, &again), KEEPSET_OK);
  EXPECT_EQ(again, result_);
  ExpectKeptFull("shed");
}

TEST_F(GatherAbi, AReservationThatFindsNoMemoryKeepsEverything) {
  Decide(Short::kKeepsFull);
  gate_.FailReservations(NoMemory());
  EXPECT_EQ(ReserveInPlace(), KEEPSET_RESOURCE_EXHAUSTED);
  EXPECT_EQ(GatherInPlace(0), KEEPSET_OK);
  ExpectKeptFull("shed");
}

TEST_F(GatherAbi, AFirstLayerInPlaceThatFindsNoMemoryKeepsEverything) {
  Decide(Short::kKeepsFull);
  gate_.FailReservations(NoMemory());
  EXPECT_EQ(GatherInPlace(0), KEEPSET_RESOURCE_EXHAUSTED);
  ExpectKeptFull("shed");
}

TEST_F(GatherAbi, RowsThatMovedInPlaceAreNeverKeptInFull) {
  Decide(Short::kKeepsFull);
  ASSERT_EQ(GatherInPlace(0), KEEPSET_OK);
  gate_.FailReservations(NoMemory());
  EXPECT_EQ(GatherInPlace(1), KEEPSET_RESOURCE_EXHAUSTED);
  EXPECT_EQ(k_[1], caches_[1]);
  gate_.AnswerGather(0, NoMemory);
  EXPECT_EQ(Gather(1), KEEPSET_RESOURCE_EXHAUSTED);
  ExpectCompressed();
  gate_.FailReservations(absl::OkStatus());
  EXPECT_EQ(GatherInPlace(1), KEEPSET_OK);
  EXPECT_NE(k_[1], caches_[1]);
}

TEST_F(GatherAbi, HostMemoryThatRunsOutWhileRowsMoveLosesTheCache) {
  Decide(Short::kKeepsFull);
  gate_.AnswerCompaction(1, []() -> absl::Status { throw std::bad_alloc(); });
  EXPECT_EQ(GatherInPlace(0), KEEPSET_DATA_LOSS);
  EXPECT_THAT(keepset_last_error(),
              HasSubstr("layer 0: gather in place of k and v: out of memory"));
  EXPECT_NE(k_[0], caches_[0]);
  ExpectCompressed();
}

TEST_F(GatherAbi, ADeviceThatFailsInTheGatherKeepsEverything) {
  Decide(Short::kFails);
  const absl::Status fault = absl::InternalError("illegal address");
  gate_.AnswerGather(0, [fault] { return fault; });
  gate_.BreakDevice(fault);
  EXPECT_EQ(Gather(0), KEEPSET_INTERNAL);
  ExpectKeptFull("device_fault");
}

TEST_F(GatherAbi, ADeviceThatFailsWhileRowsMoveKeepsNothing) {
  Decide(Short::kFails);
  const absl::Status fault = absl::InternalError("illegal address");
  gate_.FailCompaction(1, fault);
  gate_.BreakDevice(fault);
  EXPECT_EQ(GatherInPlace(0), KEEPSET_INTERNAL);
  ExpectCompressed();
}

}  // namespace
}  // namespace keepset::engine
