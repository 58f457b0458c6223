// Hopper's window kernels share work between warp groups, blocks and launches: nothing of that
// shows in the bits of the result.
#include <cstdint>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/cuda/hopper_fixture.h"
#include "tests/kernels/kernel_test_support.h"
#if defined(KEEPSET_EMULATED_DEVICE)
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"
#endif

namespace keepset::kernels {
namespace {

class HopperOrder : public HopperParity {};

TEST_F(HopperOrder, ListedHeadsHaveTheSameBitsInAnyCompany) {
  WindowCase shape = {.num_kv_heads = 2, .group = 3, .num_rows = 20, .seq_len = 90};
  const std::vector<HeadRows> heads = {{0, 0, 20, RowReduction::kMean},
                                       {1, 3, 9, RowReduction::kSum},
                                       {4, 0, 20, RowReduction::kMax}};
  const WindowTensors tensors = RandomWindow(shape, 4);
  shape.heads = heads;
  const std::vector<float> together = *Columns(shape, tensors);
  for (size_t j = 0; j < heads.size(); ++j) {
    shape.heads = {heads[j]};
    const auto first = together.begin() + static_cast<int64_t>(j) * shape.seq_len;
    EXPECT_EQ(*Columns(shape, tensors), std::vector<float>(first, first + shape.seq_len)) << j;
  }
}

TEST_F(HopperOrder, RowsHaveTheSameBitsWhicheverGroupTakesThem) {
  // Alone one product of RowStats in each of six tiles, together two, three, four and five.
  WindowCase shape = {.num_kv_heads = 1, .group = 5, .num_rows = 64, .seq_len = 700};
  const WindowTensors tensors = RandomWindow(shape, 6);
  std::vector<std::vector<float>> alone;
  for (int64_t head = 0; head < shape.group; ++head) {
    shape.heads = {{head, 0, 64, RowReduction::kMean}};
    alone.push_back(*Columns(shape, tensors));
  }
  for (size_t count = 2; count <= alone.size(); ++count) {
    shape.heads.clear();
    std::vector<float> want;
    for (size_t head = 0; head < count; ++head) {
      shape.heads.push_back({static_cast<int64_t>(head), 0, 64, RowReduction::kMean});
      want.insert(want.end(), alone[head].begin(), alone[head].end());
    }
    EXPECT_EQ(*Columns(shape, tensors), want) << count << " heads";
  }
}

TEST_F(HopperOrder, ColumnsHaveTheSameBitsInProductsOfEveryWidth) {
  // 32 slots alone are a product of 64, with others of 128 and 256; with 8 rows of another head
  // outputs end elsewhere, and beside a maximum all are added up with masks.
  WindowCase shape = {.num_kv_heads = 1, .group = 8, .num_rows = 32, .seq_len = 200};
  const WindowTensors tensors = RandomWindow(shape, 12);
  const HeadRows one = {5, 0, 32, RowReduction::kMean};
  shape.heads = {one};
  const std::vector<float> alone = *Columns(shape, tensors);
  const auto expect_in = [&](std::vector<HeadRows> heads) {
    heads.push_back(one);
    shape.heads = heads;
    const std::vector<float> together = *Columns(shape, tensors);
    EXPECT_EQ(std::vector<float>(together.end() - shape.seq_len, together.end()), alone)
        << heads.size() << " heads";
  };
  std::vector<HeadRows> heads;
  for (int64_t head = 0; head < 5; ++head) {
    heads.push_back({head, 0, 32, RowReduction::kMean});
    expect_in(heads);
  }
  expect_in({{0, 0, 8, RowReduction::kMean}});
  expect_in({{0, 0, 32, RowReduction::kMax}, {1, 0, 32, RowReduction::kSum}});
}

TEST_F(HopperOrder, LayersTogetherHaveTheBitsOfLayersAlone) {
  // On the emulator 29 of the 56 units share a launch: three layers, and a part of the fourth.
  const WindowCase shape = {
      .num_kv_heads = 8, .group = 1, .num_rows = 7, .seq_len = 90, .layout = Layout::kPaged};
  std::vector<WindowTensors> tensors;
  for (uint32_t layer = 0; layer < 7; ++layer) tensors.push_back(RandomWindow(shape, 30 + layer));
  std::vector<std::unique_ptr<DeviceDense>> queries;
  std::vector<std::unique_ptr<DeviceKv>> keys;
  std::vector<std::unique_ptr<ScoreBuffer>> buffers;
  std::vector<WindowArgs> layers;
  std::vector<ScoreBuffer*> outs;
  for (const WindowTensors& layer : tensors) {
    queries.push_back(std::make_unique<DeviceDense>(layer.q));
    keys.push_back(std::make_unique<DeviceKv>(layer.k));
    buffers.push_back(cuda_.Buffer(8, shape.seq_len));
    outs.push_back(buffers.back().get());
    WindowArgs args;
    args.q = queries.back()->queries();
    args.k = keys.back()->view();
    args.row_positions = layer.row_positions;
    args.softmax_scale = layer.scale;
    args.what = "layer";
    layers.push_back(args);
  }
  const absl::Status status = cuda_.backend->WindowColumnsOfLayers(*cuda_.context, layers, outs);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const std::vector<float> together = cuda_.Values(*outs[layer]);
    const std::unique_ptr<ScoreBuffer> alone = cuda_.Buffer(8, shape.seq_len);
    ASSERT_TRUE(cuda_.backend->WindowColumns(*cuda_.context, layers[layer], *alone).ok());
    EXPECT_EQ(together, cuda_.Values(*alone)) << "layer " << layer;
  }
}

#if defined(KEEPSET_EMULATED_DEVICE)

TEST_F(HopperOrder, BothGroupsMultiplyHoweverFewTheRows) {
  // Three blocks on the emulator, each with 4 tiles of 128 tokens in RowStats and 8 of 64 in
  // Columns.
  for (const int64_t num_rows : {8, 64, 192}) {
    const WindowCase shape = {.num_kv_heads = 1, .group = 1, .num_rows = num_rows, .seq_len = 1536};
    const WindowTensors tensors = RandomWindow(shape, 8);
    const cuda::EmulatedCounts before = cuda::CountsSoFar();
    ASSERT_TRUE(Columns(shape, tensors).ok());
    const cuda::EmulatedCounts after = cuda::CountsSoFar();
    EXPECT_GT(after.products[0], before.products[0]);
    EXPECT_EQ(after.products[0] - before.products[0], after.products[1] - before.products[1])
        << num_rows << " rows";
  }
}

TEST_F(HopperOrder, OrderOfThreadsAndLoadsDoesNotShow) {
  const WindowCase shape = {
      .num_kv_heads = 1, .num_rows = 20, .seq_len = 300, .layout = Layout::kPaged};
  const WindowTensors tensors = RandomWindow(shape, 3);
  std::vector<float> norms;
  const std::vector<float> first = *Columns(shape, tensors, nullptr, &norms);
  for (const uint32_t seed : {2u, 3u, 4u}) {
    cuda::SetEmulationSeed(seed);
    std::vector<float> again;
    EXPECT_EQ(*Columns(shape, tensors, nullptr, &again), first) << "seed " << seed;
    EXPECT_EQ(again, norms) << "seed " << seed;
  }
}

// 1 to 3 products of RowStats for each stage: a group's warps may be apart when they give it back,
// and a group gives back a stage of which it reads nothing.
TEST_F(HopperOrder, StagesAreFilledAgainInAnyOrderOfThreads) {
  for (const uint32_t seed : {2u, 3u, 4u}) {
    for (const int64_t num_rows : {20, 65}) {
      cuda::SetEmulationSeed(seed);
      ExpectNearOracle({.num_kv_heads = 1, .num_rows = num_rows, .seq_len = 1600, .head_dim = 128});
    }
  }
}

TEST_F(HopperOrder, RowsPastTheLastOfAKvHeadBelongToNobody) {
  for (const uint32_t seed : {2u, 3u, 4u}) {
    cuda::SetEmulationSeed(seed);
    ExpectNearOracle({.num_kv_heads = 3, .group = 1, .num_rows = 70, .seq_len = 130});
  }
}

#endif

}  // namespace
}  // namespace keepset::kernels
