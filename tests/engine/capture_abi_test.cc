// A capture file through keepset.h: open, decide, gather, write a result file, read it back.
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "engine/keepset.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/model_fingerprint.h"
#include "tables/safetensors.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::engine {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

class CaptureAbiTest : public ::testing::Test {
 protected:
  CaptureAbiTest() {
    std::string pattern = ::testing::TempDir() + "keepset_capture_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    keepset_engine_options options = {};
    options.struct_size = sizeof(options);
    options.num_threads = 1;
    EXPECT_EQ(keepset_engine_create(&options, &engine_), KEEPSET_OK);
    WriteCapture();
    EXPECT_EQ(keepset_capture_open(CapturePath().c_str(), &capture_), KEEPSET_OK)
        << keepset_last_error();
  }

  ~CaptureAbiTest() override {
    keepset_capture_close(capture_);
    keepset_engine_destroy(engine_);
    std::filesystem::remove_all(directory_);
  }

  std::string CapturePath() const { return directory_ + "/prompt.safetensors"; }
  std::string ResultPath() const { return directory_ + "/result.safetensors"; }

  void WriteCapture() const {
    const fakes::PromptShape& shape = prompt_.shape();
    const std::string json =
        R"({"format": "keepset.capture", "format_version": 1, "model": )" +
        tables::ModelFingerprintJson(prompt_.model()) +
        R"(, "seq_len": 96, "window": 8, "num_layers": 3, "num_qo_heads": 4, )"
        R"("num_kv_heads": 2, "head_dim": 16, "softmax_scale": 0.25, "ppl": 12.5, )"
        R"("spans": [{"name": "system", "begin": 5, "end": 9}]})";
    std::vector<tables::TensorToWrite> tensors;
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      const std::string prefix = "layers." + std::to_string(layer) + ".";
      const LayerObservation from = prompt_.observation(layer);
      const auto add = [&](const std::string& name, const std::byte* data, int64_t size,
                           std::vector<int64_t> dims) {
        tables::TensorToWrite tensor;
        tensor.name = prefix + name;
        tensor.shape = std::move(dims);
        tensor.bytes = absl::MakeConstSpan(data, static_cast<size_t>(size));
        tensors.push_back(tensor);
      };
      add("q_window", from.q_window.data, from.q_window.size_bytes, {4, 8, 16});
      add("k", from.k.data, from.k.size_bytes, {2, 96, 16});
      add("v", from.v.data, from.v.size_bytes, {2, 96, 16});
    }
    const auto bytes = tables::SerializeSafetensors({{"keepset", json}}, tensors);
    ASSERT_TRUE(bytes.ok());
    ASSERT_TRUE(tables::WriteFileAtomically(CapturePath(), *bytes).ok());
  }

  keepset_operation_spec Spec(const char* policy) const {
    keepset_operation_spec spec = {};
    spec.struct_size = sizeof(spec);
    spec.policy = policy;
    spec.budget_kind = KEEPSET_BUDGET_TOKENS;
    spec.budget = 10;
    EXPECT_EQ(keepset_capture_fill_spec(capture_, &spec), KEEPSET_OK);
    return spec;
  }

  keepset_layer_observation Layer(int64_t layer) const {
    keepset_layer_observation observation = {};
    observation.struct_size = sizeof(observation);
    EXPECT_EQ(keepset_capture_layer(capture_, layer, &observation), KEEPSET_OK)
        << keepset_last_error();
    return observation;
  }

  keepset_operation* Observed(const keepset_operation_spec& spec) const {
    keepset_operation* operation = nullptr;
    EXPECT_EQ(keepset_operation_begin(engine_, &spec, &operation), KEEPSET_OK)
        << keepset_last_error();
    for (int64_t layer = 0; layer < prompt_.shape().num_layers; ++layer) {
      const keepset_layer_observation observation = Layer(layer);
      EXPECT_EQ(keepset_operation_observe(operation, layer, &observation), KEEPSET_OK)
          << keepset_last_error();
    }
    return operation;
  }

  fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  std::string directory_;
  keepset_engine* engine_ = nullptr;
  keepset_capture* capture_ = nullptr;
};

TEST_F(CaptureAbiTest, FillsTheSpecFromTheFile) {
  const keepset_operation_spec spec = Spec("snapkv");
  EXPECT_EQ(spec.seq_len, 96);
  EXPECT_EQ(spec.num_rows, 8);
  EXPECT_EQ(spec.row_positions, nullptr);
  EXPECT_EQ(spec.softmax_scale, 0.25f);
  EXPECT_EQ(spec.kv_dtype, KEEPSET_F32);
  EXPECT_EQ(spec.ppl, 12.5);
  EXPECT_EQ(spec.budget, 10);
}

TEST_F(CaptureAbiTest, LayersAndGathersTogetherAreThoseOneByOne) {
  keepset_operation* const alone = Observed(Spec("snapkv"));
  keepset_operation* together = nullptr;
  const keepset_operation_spec spec = Spec("snapkv");
  ASSERT_EQ(keepset_operation_begin(engine_, &spec, &together), KEEPSET_OK);
  const std::vector<int64_t> layers = {0, 1, 2};
  std::vector<keepset_layer_observation> observations;
  for (const int64_t layer : layers) observations.push_back(Layer(layer));
  std::vector<const keepset_layer_observation*> pointers;
  for (const keepset_layer_observation& one : observations) pointers.push_back(&one);
  ASSERT_EQ(keepset_operation_observe_layers(together, layers.data(), pointers.data(), 3),
            KEEPSET_OK)
      << keepset_last_error();
  std::vector<std::vector<float>> rows[2];
  for (keepset_operation* const operation : {alone, together}) {
    const keepset_result* result = nullptr;
    ASSERT_EQ(keepset_operation_finish(operation, &result), KEEPSET_OK);
    // [layers][K, V]: 2 KV heads of 10 rows of 16 values.
    std::vector<std::vector<float>>& out = rows[operation == together ? 1 : 0];
    out.assign(2 * layers.size(), std::vector<float>(2 * 10 * 16));
    std::vector<keepset_kv_view> views(out.size());
    std::vector<keepset_layer_gather> gathers(layers.size());
    std::vector<const keepset_layer_gather*> gather_pointers;
    for (size_t i = 0; i < out.size(); ++i) {
      views[i].data = reinterpret_cast<unsigned char*>(out[i].data());
      views[i].size_bytes = static_cast<int64_t>(out[i].size() * sizeof(float));
      views[i].dtype = KEEPSET_F32;
      views[i].num_kv_heads = 2;
      views[i].seq_len = 10;
      views[i].head_dim = 16;
      views[i].head_stride = 160;
      views[i].token_stride = 16;
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      gathers[i].struct_size = sizeof(keepset_layer_gather);
      gathers[i].layer = layers[i];
      gathers[i].k = &observations[i].k;
      gathers[i].v = &observations[i].v;
      gathers[i].out_k = &views[2 * i];
      gathers[i].out_v = &views[2 * i + 1];
      gather_pointers.push_back(&gathers[i]);
      if (operation == together) continue;
      EXPECT_EQ(keepset_operation_gather(operation, layers[i], gathers[i].k, gathers[i].v,
                                         gathers[i].out_k, gathers[i].out_v),
                KEEPSET_OK)
          << keepset_last_error();
    }
    if (operation == together) {
      EXPECT_EQ(keepset_operation_gather_layers(operation, gather_pointers.data(), 3), KEEPSET_OK)
          << keepset_last_error();
    }
  }
  EXPECT_EQ(rows[1], rows[0]);
  keepset_operation_destroy(alone);
  keepset_operation_destroy(together);
}

TEST_F(CaptureAbiTest, DecidesLikeTheEngineOnTheSameTensors) {
  OperationSpec spec = prompt_.spec();
  spec.policy = "snapkv";
  spec.budget.kind = Budget::Kind::kTokens;
  spec.budget.tokens = 10;
  const absl::StatusOr<OperationResult> expected = Bench().Run(spec, prompt_);
  ASSERT_TRUE(expected.ok());
  keepset_operation* const operation = Observed(Spec("snapkv"));
  const keepset_result* result = nullptr;
  ASSERT_EQ(keepset_operation_finish(operation, &result), KEEPSET_OK);
  for (int64_t layer = 0; layer < 3; ++layer) {
    for (int64_t set = 0; set < 2; ++set) {
      const int32_t* indices = nullptr;
      int64_t count = 0;
      ASSERT_EQ(keepset_result_keep_indices(result, layer, set, &indices, &count), KEEPSET_OK);
      EXPECT_THAT(std::vector<int32_t>(indices, indices + count),
                  ElementsAreArray(expected->layers[layer].keep_indices[set]));
    }
  }
  keepset_operation_destroy(operation);
}

TEST_F(CaptureAbiTest, WritesAResultFileWithGatheredRows) {
  keepset_operation_spec spec = Spec("knorm");
  spec.scope = "layer_equal";
  keepset_operation* const operation = Observed(spec);
  const keepset_result* result = nullptr;
  ASSERT_EQ(keepset_operation_finish(operation, &result), KEEPSET_OK);
  std::vector<keepset_index_set> sets(3);
  std::vector<keepset_gathered_layer> gathered(3);
  std::vector<std::vector<float>> k(3, std::vector<float>(2 * 10 * 16));
  std::vector<std::vector<float>> v = k;
  for (int64_t layer = 0; layer < 3; ++layer) {
    sets[layer].layer = layer;
    sets[layer].set = -1;
    ASSERT_EQ(
        keepset_result_keep_indices(result, layer, 0, &sets[layer].indices, &sets[layer].count),
        KEEPSET_OK);
    const keepset_layer_observation source = Layer(layer);
    keepset_kv_view out_k = source.k;
    out_k.size_bytes = 2 * 10 * 16 * 4;
    out_k.seq_len = 10;
    out_k.head_stride = 10 * 16;
    keepset_kv_view out_v = out_k;
    out_k.data = k[layer].data();
    out_v.data = v[layer].data();
    ASSERT_EQ(keepset_operation_gather(operation, layer, &source.k, &source.v, &out_k, &out_v),
              KEEPSET_OK)
        << keepset_last_error();
    gathered[layer] = {layer, -1, KEEPSET_F32, 0, 2, 10, 16, 16, k[layer].data(), v[layer].data()};
  }
  ASSERT_EQ(keepset_result_write(ResultPath().c_str(), keepset_result_json(result), sets.data(),
                                 sets.size(), gathered.data(), gathered.size()),
            KEEPSET_OK)
      << keepset_last_error();
  const auto file = tables::SafetensorsFile::Open(ResultPath(), tables::ReadMode::kMap);
  ASSERT_TRUE(file.ok()) << file.status();
  const tables::TensorInfo* const rows = (*file)->Find("layers.2.k");
  ASSERT_NE(rows, nullptr);
  EXPECT_THAT(rows->shape, ElementsAreArray({2, 10, 16}));
  EXPECT_EQ(std::memcmp(rows->bytes.data(), k[2].data(), rows->bytes.size()), 0);
  const tables::TensorInfo* const indices = (*file)->Find("layers.1.keep_indices");
  ASSERT_NE(indices, nullptr);
  EXPECT_EQ(indices->dtype, tables::TensorDType::kI32);
  keepset_operation_destroy(operation);
}

TEST_F(CaptureAbiTest, ResultWithoutItsSetsLeavesNoFile) {
  keepset_operation* const operation = Observed(Spec("knorm"));
  const keepset_result* result = nullptr;
  ASSERT_EQ(keepset_operation_finish(operation, &result), KEEPSET_OK);
  EXPECT_EQ(keepset_result_write(ResultPath().c_str(), keepset_result_json(result), nullptr, 0,
                                 nullptr, 0),
            KEEPSET_INVALID_ARGUMENT);
  EXPECT_FALSE(std::filesystem::exists(ResultPath()));
  keepset_operation_destroy(operation);
}

TEST_F(CaptureAbiTest, SpansAreFoundByName) {
  keepset_span span = {};
  ASSERT_EQ(keepset_capture_span(capture_, "system", &span), KEEPSET_OK);
  EXPECT_STREQ(span.name, "system");
  EXPECT_EQ(span.begin, 5);
  EXPECT_EQ(span.end, 9);
  EXPECT_EQ(keepset_capture_span(capture_, "user", &span), KEEPSET_NOT_FOUND);
  EXPECT_THAT(keepset_last_error(), HasSubstr("system"));
}

TEST_F(CaptureAbiTest, LayerOutsideTheCaptureIsRefused) {
  keepset_layer_observation observation = {};
  observation.struct_size = sizeof(observation);
  EXPECT_EQ(keepset_capture_layer(capture_, 3, &observation), KEEPSET_INVALID_ARGUMENT);
  EXPECT_STREQ(keepset_last_error(), "layer 3, want 0..2");
}

// A caller may hand in a struct of another layer, or one of which only struct_size is set.
TEST_F(CaptureAbiTest, ALayerIsClearedOfWhatTheCaptureDoesNotState) {
  keepset_layer_observation observation;
  std::memset(&observation, 0x5a, sizeof(observation));
  observation.struct_size = offsetof(keepset_layer_observation, qo_heads);
  EXPECT_EQ(keepset_capture_layer(capture_, 0, &observation), KEEPSET_OK);
  EXPECT_EQ(observation.lse_base, KEEPSET_LSE_BASE_E);
  EXPECT_EQ(observation.column_stats.data, nullptr);
  EXPECT_NE(observation.qo_heads, nullptr);  // not of this caller's struct
  observation.struct_size = sizeof(observation);
  EXPECT_EQ(keepset_capture_layer(capture_, 0, &observation), KEEPSET_OK);
  EXPECT_EQ(observation.qo_heads, nullptr);
  EXPECT_EQ(observation.struct_size, sizeof(observation));
}

TEST_F(CaptureAbiTest, ErrorsAreClearedByTheNextSuccess) {
  keepset_span span = {};
  EXPECT_EQ(keepset_capture_span(capture_, "user", &span), KEEPSET_NOT_FOUND);
  EXPECT_EQ(keepset_capture_span(capture_, "system", &span), KEEPSET_OK);
  EXPECT_STREQ(keepset_last_error(), "");
}

TEST_F(CaptureAbiTest, ParameterGivenTwiceIsRefused) {
  const keepset_parameter parameters[] = {{"dilate", "1"}, {"dilate", "2"}};
  keepset_operation_spec spec = Spec("snapkv");
  spec.parameters = parameters;
  spec.num_parameters = 2;
  keepset_operation* operation = nullptr;
  EXPECT_EQ(keepset_operation_begin(engine_, &spec, &operation), KEEPSET_INVALID_ARGUMENT);
  EXPECT_STREQ(keepset_last_error(), "parameter dilate is given twice");
}

TEST_F(CaptureAbiTest, PagedViewWithoutABlockTableIsRefused) {
  const keepset_operation_spec spec = Spec("knorm");
  keepset_operation* operation = nullptr;
  ASSERT_EQ(keepset_operation_begin(engine_, &spec, &operation), KEEPSET_OK);
  keepset_layer_observation observation = Layer(0);
  observation.k.block_size = 16;
  EXPECT_EQ(keepset_operation_observe(operation, 0, &observation), KEEPSET_INVALID_ARGUMENT);
  EXPECT_THAT(keepset_last_error(), HasSubstr("layer 0: k: block_size=16 with num_blocks=0"));
  keepset_operation_destroy(operation);
}

}  // namespace
}  // namespace keepset::engine
