#include "service/rpc/gather_codec.h"

#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace keepset::service {
namespace {

// One head, `tokens` tokens of two floats.
template <typename View>
View At(std::byte* data, int64_t tokens) {
  View view;
  view.data = data;
  view.size_bytes = tokens * 8;
  view.num_kv_heads = 1;
  view.seq_len = tokens;
  view.head_dim = 2;
  view.token_stride = 2;
  view.head_stride = tokens * 2;
  return view;
}

class CheckNoOverlapTest : public ::testing::Test {
 protected:
  alignas(8) std::array<std::byte, 1024> memory_ = {};
};

TEST_F(CheckNoOverlapTest, DisjointTensorsPass) {
  DecodedLayer layer;
  layer.observation.k = At<kernels::KvView>(memory_.data(), 4);
  layer.observation.v = At<kernels::KvView>(memory_.data() + 32, 4);
  layer.out_k = At<kernels::MutableKvView>(memory_.data() + 64, 2);
  layer.out_v = At<kernels::MutableKvView>(memory_.data() + 80, 2);
  std::vector<DecodedLayer> layers;
  layers.push_back(std::move(layer));
  EXPECT_TRUE(CheckNoOverlap(layers, v1::GATHER_DESTINATION).ok());
}

TEST_F(CheckNoOverlapTest, DestinationInsideASourceIsNamed) {
  DecodedLayer layer;
  layer.observation.k = At<kernels::KvView>(memory_.data(), 16);
  layer.observation.v = At<kernels::KvView>(memory_.data() + 128, 16);
  layer.out_k = At<kernels::MutableKvView>(memory_.data() + 512, 2);
  layer.out_v = At<kernels::MutableKvView>(memory_.data() + 64, 2);
  std::vector<DecodedLayer> layers;
  layers.push_back(std::move(layer));
  const absl::Status status = CheckNoOverlap(layers, v1::GATHER_DESTINATION);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("destination.v"), std::string::npos) << status;
}

TEST_F(CheckNoOverlapTest, SourcesMayShareBytes) {
  DecodedLayer layer;
  layer.observation.k = At<kernels::KvView>(memory_.data(), 4);
  layer.observation.v = At<kernels::KvView>(memory_.data(), 4);
  layer.out_k = At<kernels::MutableKvView>(memory_.data() + 64, 2);
  layer.out_v = At<kernels::MutableKvView>(memory_.data() + 80, 2);
  std::vector<DecodedLayer> layers;
  layers.push_back(std::move(layer));
  EXPECT_TRUE(CheckNoOverlap(layers, v1::GATHER_DESTINATION).ok());
}

TEST_F(CheckNoOverlapTest, FreshBlocksOfThePoolOfTheSourcePass) {
  const std::vector<int32_t> used = {0, 2};
  const std::vector<int32_t> fresh = {1};
  DecodedLayer layer;
  layer.observation.k = At<kernels::KvView>(memory_.data(), 4);
  layer.observation.k.block_size = 2;
  layer.observation.k.block_stride = 4;
  layer.observation.k.block_table = used;
  layer.observation.v = At<kernels::KvView>(memory_.data() + 512, 4);
  layer.out_k = At<kernels::MutableKvView>(memory_.data(), 2);
  layer.out_k.block_size = 2;
  layer.out_k.block_stride = 4;
  layer.out_k.block_table = fresh;
  layer.out_v = At<kernels::MutableKvView>(memory_.data() + 768, 2);
  std::vector<DecodedLayer> layers;
  layers.push_back(std::move(layer));
  // NHD blocks of one head: token stride 2, so that a block ends where the next begins.
  layers[0].observation.k.head_stride = layers[0].out_k.head_stride = 2;
  EXPECT_TRUE(CheckNoOverlap(layers, v1::GATHER_DESTINATION).ok());
  layers[0].out_k.block_table = absl::MakeConstSpan(used).last(1);
  EXPECT_FALSE(CheckNoOverlap(layers, v1::GATHER_DESTINATION).ok());
}

// Only the prompt's tokens of a block are addressed, however many more it has room for.
TEST_F(CheckNoOverlapTest, BlocksAreNoLongerThanTheirTensor) {
  const std::vector<int32_t> table = {0};
  std::vector<DecodedLayer> layers(1);
  layers[0].out_k = At<kernels::MutableKvView>(memory_.data(), 4);
  layers[0].out_k.block_size = int64_t{1} << 40;
  layers[0].out_k.token_stride = int64_t{1} << 22;
  layers[0].out_k.seq_len = 1;
  layers[0].out_k.block_stride = 8;
  layers[0].out_k.block_table = table;
  layers[0].out_v = layers[0].out_k;
  EXPECT_EQ(CheckNoOverlap(layers, v1::GATHER_IN_PLACE).code(), absl::StatusCode::kInvalidArgument);
  layers[0].out_v.data += 512;
  EXPECT_TRUE(CheckNoOverlap(layers, v1::GATHER_IN_PLACE).ok());
}

TEST_F(CheckNoOverlapTest, TensorsInPlaceLieApart) {
  std::vector<DecodedLayer> layers(2);
  for (size_t l = 0; l < 2; ++l) {
    layers[l].out_k = At<kernels::MutableKvView>(memory_.data() + l * 256, 8);
    layers[l].out_v = At<kernels::MutableKvView>(memory_.data() + l * 256 + 64, 8);
    layers[l].observation.k = kernels::Readable(layers[l].out_k);
    layers[l].observation.v = kernels::Readable(layers[l].out_v);
  }
  EXPECT_TRUE(CheckNoOverlap(layers, v1::GATHER_IN_PLACE).ok());
  layers[1].out_v.data = layers[0].out_k.data + 32;
  const absl::Status status = CheckNoOverlap(layers, v1::GATHER_IN_PLACE);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("layer 1: v shares bytes with layer 0: k"), std::string::npos)
      << status;
}

TEST(CloseGaps, LeavesEachHeadsRowsOneAfterTheOther) {
  engine::LayerResult result;
  result.keep_indices = {{0}, {0, 1, 2}};
  std::string bytes = "AAxxyyBBCCDD";
  CloseGaps(result, 3, 2, &bytes);
  EXPECT_EQ(bytes, "AABBCCDD");
}

}  // namespace
}  // namespace keepset::service
