// keepset_operation_device_bytes: what the caller says of its layers reaches the engine.
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "engine/c_abi/handles.h"
#include "engine/keepset.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

namespace {

constexpr char kModel[] =
    R"({"architecture": "Sizes", "num_layers": 32, "num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128})";
constexpr int64_t kSeqLen = 32768;
constexpr int64_t kWindow = 64;

class DeviceBytesAbi : public ::testing::Test {
 protected:
  void SetUp() override {
    engine_.backend = *NewCudaBackend({});
    engine_.policies = engine::NewBuiltinPolicyRegistry();
    spec_.struct_size = sizeof(spec_);
    spec_.model_json = kModel;
    spec_.seq_len = kSeqLen;
    spec_.num_rows = kWindow;
    spec_.softmax_scale = 0.1f;
    spec_.kv_dtype = KEEPSET_BF16;
    spec_.policy = "snapkv";
    spec_.budget_kind = KEEPSET_BUDGET_TOKENS;
    spec_.budget = 512;
    spec_.ppl = std::nan("");
    options_.struct_size = sizeof(options_);
  }

  int64_t Said(const keepset_device_bytes_options* options) {
    int64_t bytes = -1;
    EXPECT_EQ(keepset_operation_device_bytes(&engine_, &spec_, options, &bytes), KEEPSET_OK)
        << keepset_last_error();
    return bytes;
  }

  static keepset_rows_view Rows(int64_t last_dim, int32_t dtype) {
    keepset_rows_view view = {};
    view.data = std::bit_cast<const void*>(uintptr_t{4096});
    view.size_bytes = int64_t{32} * kWindow * last_dim * 4;
    view.dtype = dtype;
    view.num_qo_heads = 32;
    view.num_rows = kWindow;
    view.last_dim = last_dim;
    view.head_stride = kWindow * last_dim;
    view.row_stride = last_dim;
    return view;
  }
  static keepset_layer_observation Layer() {
    keepset_layer_observation layer = {};
    layer.struct_size = sizeof(layer);
    layer.q_window = Rows(128, KEEPSET_BF16);
    layer.k.data = std::bit_cast<void*>(uintptr_t{1} << 32);
    layer.k.size_bytes = int64_t{8} * kSeqLen * 128 * 2;
    layer.k.dtype = KEEPSET_BF16;
    layer.k.num_kv_heads = 8;
    layer.k.seq_len = kSeqLen;
    layer.k.head_dim = 128;
    layer.k.head_stride = kSeqLen * 128;
    layer.k.token_stride = 128;
    return layer;
  }

  keepset_engine engine_;
  keepset_operation_spec spec_ = {};
  keepset_device_bytes_options options_ = {};
};

TEST_F(DeviceBytesAbi, AreThoseOfAllLayersTogetherWhereNothingIsSaid) {
  EXPECT_EQ(Said(nullptr), Said(&options_));
  // At least the columns of a layer for each of 32.
  EXPECT_GE(Said(nullptr), int64_t{32} * 32 * kSeqLen * int64_t{sizeof(float)});
}

TEST_F(DeviceBytesAbi, OneByOneTakesLess) {
  options_.handover = KEEPSET_LAYERS_ONE_BY_ONE;
  EXPECT_LT(Said(&options_), Said(nullptr) / 8);
}

// 32 MiB of rows go through the 16 MiB there are at most.
TEST_F(DeviceBytesAbi, RowsInPlaceTakeAScratch) {
  spec_.policy = "streaming_llm";
  spec_.budget = kSeqLen / 2;
  options_.row_move = KEEPSET_ROWS_STAY;
  EXPECT_LT(Said(&options_), int64_t{16} << 20);
  options_.row_move = KEEPSET_ROWS_IN_PLACE;
  EXPECT_GE(Said(&options_), int64_t{16} << 20);
}

// With its log-sum-exp no statistics of rows are kept.
TEST_F(DeviceBytesAbi, ALayerThatIsGivenCounts) {
  keepset_layer_observation layer = Layer();
  options_.layer = &layer;
  const int64_t without = Said(&options_);
  layer.window_lse = Rows(1, KEEPSET_F32);
  EXPECT_LT(Said(&options_), without);
}

// Its scores alone are more than there is, so nothing is read of what it is shown.
TEST_F(DeviceBytesAbi, TooFewEndAsTheCallerAsks) {
  engine_.backend = *NewCudaBackend({.device_memory_bytes = 1 << 20});
  keepset_operation* operation = nullptr;
  EXPECT_EQ(keepset_operation_begin(&engine_, &spec_, &operation), KEEPSET_RESOURCE_EXHAUSTED);
  spec_.keep_full_on_short_memory = 1;
  ASSERT_EQ(keepset_operation_begin(&engine_, &spec_, &operation), KEEPSET_OK);
  const keepset_layer_observation layer = Layer();
  for (int64_t i = 0; i < 32; ++i) {
    EXPECT_EQ(keepset_operation_observe(operation, i, &layer), KEEPSET_OK) << keepset_last_error();
  }
  const keepset_result* result = nullptr;
  ASSERT_EQ(keepset_operation_finish(operation, &result), KEEPSET_OK) << keepset_last_error();
  EXPECT_STREQ(keepset_result_outcome(result), "kept_full");
  EXPECT_STREQ(keepset_result_reason(result), "shed");
  keepset_operation_destroy(operation);
}

TEST_F(DeviceBytesAbi, ALayerThatDoesNotFitTheSpecIsRefused) {
  keepset_layer_observation layer = {};
  layer.struct_size = sizeof(layer);
  options_.layer = &layer;
  int64_t bytes = -1;
  EXPECT_EQ(keepset_operation_device_bytes(&engine_, &spec_, &options_, &bytes),
            KEEPSET_INVALID_ARGUMENT);
  EXPECT_NE(std::string(keepset_last_error()).find("layer 0: missing q_window"), std::string::npos)
      << keepset_last_error();
}

}  // namespace
}  // namespace keepset::kernels
