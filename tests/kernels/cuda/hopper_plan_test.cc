// Which rows Hopper's window kernels take, why not, and how their keys are described to TMA.
#include <cstdint>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/hopper_window.h"
#include "kernels/cuda/window_scores.h"

namespace keepset::kernels::cuda {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kShared = 227 << 10;

// One layer of an 8B model: 8 KV heads of 4 query heads, 64 rows.
struct Call {
  WindowParams params;
  std::vector<WindowUnit> units;
  std::vector<WindowOutput> outputs;
  std::vector<KeyMemory> keys = {{}};
  int32_t table[1] = {};

  explicit Call(int head_dim = 128, int group = 4, int num_rows = 64) {
    constexpr int kHeads = 8;
    DeviceRows& k = params.shape.k;
    k.num_heads = kHeads;
    k.num_tokens = 1000;
    k.head_dim = head_dim;
    k.dtype = DType::kBF16;
    k.head_bytes = head_dim * 2;
    k.token_bytes = kHeads * k.head_bytes;
    params.num_layers = 1;
    params.num_units = kHeads;
    params.max_unit_rows = group * num_rows;
    params.shape.num_chunks = 2;
    for (int u = 0; u < kHeads; ++u) {
      WindowUnit unit;
      unit.kv_head = u;
      unit.first_row = u * group * num_rows;
      unit.num_rows = group * num_rows;
      unit.first_output = u * group;
      unit.num_outputs = group;
      units.push_back(unit);
      for (int j = 0; j < group; ++j) {
        WindowOutput output;
        output.first_row = unit.first_row + j * num_rows;
        output.num_rows = num_rows;
        outputs.push_back(output);
      }
    }
  }

  void SetLayers(int layers) {
    params.num_layers = layers;
    keys.resize(static_cast<size_t>(layers));
  }

  void SetPages(int block_size, int64_t num_blocks, int32_t last_block) {
    DeviceRows& k = params.shape.k;
    k.block_size = FastDivider(static_cast<uint32_t>(block_size));
    k.block_bytes = block_size * k.token_bytes;
    params.layers[0].k_table = table;
    keys[0] = {num_blocks * k.block_bytes, last_block};
  }

  HopperPlan Plan(TileKind tile = TileKind::kMma) const {
    WindowPlan portable;
    portable.tile = tile;
    return PlanHopper(params, portable, units, outputs, keys, {kShared, 132});
  }
};

TEST(HopperPlan, Of8B) {
  const HopperPlan plan = Call().Plan();
  EXPECT_EQ(plan.unsuited, "");
  EXPECT_EQ(plan.columns_slots, 256);
  EXPECT_EQ(plan.columns_capacity, 256);
  EXPECT_GE(plan.columns_stages, 4);
  EXPECT_EQ(plan.stats_tokens, 128);
  EXPECT_EQ(plan.stats_rows, 256);
  EXPECT_GE(plan.stats_stages, 4);
  EXPECT_EQ(plan.parts.size(), 8);
}

TEST(HopperPlan, OutputsThatDoNotFitMakeSeveralParts) {
  const HopperPlan plan = Call(128, 9, 64).Plan();
  EXPECT_EQ(plan.unsuited, "");
  EXPECT_EQ(plan.columns_capacity, 512);
  ASSERT_EQ(plan.parts.size(), 16);
  EXPECT_EQ(plan.parts[2].unit, 1);
  EXPECT_EQ(plan.parts[2].first_output, 9);
  EXPECT_EQ(plan.parts[2].num_outputs, 8);
  EXPECT_EQ(plan.parts[2].is_first, 1);
  EXPECT_EQ(plan.parts[3].first_output, 17);
  EXPECT_EQ(plan.parts[3].num_slots, 64);
  EXPECT_EQ(plan.parts[3].is_first, 0);
  EXPECT_THAT(plan.unit_part, ElementsAre(0, 2, 4, 6, 8, 10, 12, 14, 16));
}

TEST(HopperPlan, EightHeadsOfOneKvHeadReadTheirKeysOnce) {
  const HopperPlan plan = Call(128, 8, 64).Plan();
  EXPECT_EQ(plan.stats_rows, 512);
  EXPECT_EQ(plan.stats_stages, 3);
}

TEST(HopperPlan, FewRowsLeaveRoomForStages) {
  const HopperPlan plan = Call(128, 1, 60).Plan();
  EXPECT_EQ(plan.stats_rows, 64);
  EXPECT_EQ(plan.stats_stages, 6);
}

TEST(HopperPlan, RowsThatDoNotFitMakePartsOfOneSize) {
  EXPECT_EQ(Call(128, 9, 64).Plan().stats_rows, 320);
  // Rows of 512 bytes: 384 of them leave room for one stage.
  EXPECT_EQ(Call(256, 5, 64).Plan().stats_rows, 320);
  EXPECT_EQ(Call(256, 6, 64).Plan().stats_rows, 192);
  EXPECT_GE(Call(256, 6, 64).Plan().stats_stages, 2);
}

TEST(HopperPlan, LaunchesKeepTheDeviceBusy) {
  // All 8 units of the layer are too few.
  EXPECT_EQ(Call().Plan().units_at_once, 8);
  Call call;
  call.SetLayers(32);
  // 32k tokens: 33 units are 16 chunks for each of 132 multiprocessors.
  call.params.shape.num_chunks = 64;
  EXPECT_EQ(call.Plan().units_at_once, 33);
  // 128k tokens: between 8 and 16 chunks for each.
  call.params.shape.num_chunks = 256;
  EXPECT_EQ(call.Plan().units_at_once, 10);
}

TEST(HopperPlan, EveryLaunchHasUnits) {
  Call call;
  for (const int layers : {1, 3, 32}) {
    call.SetLayers(layers);
    for (int chunks = 1; chunks < 3000; chunks = chunks * 5 / 3 + 1) {
      call.params.shape.num_chunks = chunks;
      EXPECT_GE(call.Plan().units_at_once, 1) << chunks;
      EXPECT_LE(call.Plan().units_at_once, 8 * layers) << chunks;
    }
  }
}

TEST(HopperPlan, FewRowsTakeNarrowProducts) {
  EXPECT_EQ(Call(128, 1, 64).Plan().columns_slots, 64);
  EXPECT_EQ(Call(128, 2, 60).Plan().columns_slots, 128);
}

TEST(HopperPlan, ContiguousKeysHaveThreeDimensionsByStride) {
  const Call call;
  const HopperPlan plan = call.Plan();
  EXPECT_EQ(plan.keys.num_spans, 2);
  EXPECT_EQ(plan.keys.head_dim, 1);
  EXPECT_EQ(plan.keys.token_dim, 2);
  EXPECT_EQ(plan.keys.block_dim, 0);
  const TensorMapSpec map = KeyMap(call.params, plan, 0, call.keys[0]);
  EXPECT_EQ(map.rank, 3);
  EXPECT_THAT(map.dims, ElementsAre(128, 8, 1000, 0));
  EXPECT_THAT(map.stride_bytes, ElementsAre(0, 256, 2048, 0));
  EXPECT_THAT(map.box, ElementsAre(64, 1, 64, 0));
}

TEST(HopperPlan, PagedKeysHaveFourDimensions) {
  Call call;
  call.SetPages(16, 100, 99);
  const HopperPlan plan = call.Plan();
  EXPECT_EQ(plan.unsuited, "");
  EXPECT_EQ(plan.keys.box_tokens, 16);
  const TensorMapSpec map = KeyMap(call.params, plan, 0, call.keys[0]);
  EXPECT_EQ(map.rank, 4);
  EXPECT_THAT(map.dims, ElementsAre(128, 8, 16, 100));
  EXPECT_THAT(map.stride_bytes, ElementsAre(0, 256, 2048, 32768));
  EXPECT_THAT(map.box, ElementsAre(64, 1, 16, 1));
}

TEST(HopperPlan, BoxesStayWithinAPage) {
  Call call;
  call.SetPages(48, 50, 3);
  EXPECT_EQ(call.Plan().keys.box_tokens, 16);
  call.SetPages(256, 50, 3);
  EXPECT_EQ(call.Plan().keys.box_tokens, 64);
}

TEST(HopperPlan, PagesOfOtherThanEightTokensAreUnsuited) {
  Call call;
  call.SetPages(12, 100, 99);
  EXPECT_EQ(call.Plan().unsuited, "block_size=12, want a multiple of 8");
}

TEST(HopperPlan, LastPageThatCannotBeReadAsAWholeIsUnsuited) {
  Call call;
  call.SetPages(16, 100, 99);
  call.keys[0].size_bytes -= 2;
  EXPECT_THAT(call.Plan().unsuited, HasSubstr("block 99 of layer 0"));
}

TEST(HopperPlan, StridesThatDoNotNestAreUnsuited) {
  Call call;
  call.params.shape.k.token_bytes += 16;
  EXPECT_THAT(call.Plan().unsuited, HasSubstr("a stride of 2064 bytes after one of 256"));
}

TEST(HopperPlan, RowsThatDoNotSuitTensorCoresAreUnsuited) {
  EXPECT_THAT(Call().Plan(TileKind::kFma).unsuited, HasSubstr("tensor cores"));
}

TEST(HopperPlan, HeadDimensionsThatDoNotFitAreUnsuited) {
  EXPECT_EQ(Call(32).Plan().unsuited, "head_dim=32, want at least 64");
  EXPECT_THAT(Call(576).Plan().unsuited, HasSubstr("head_dim=576 leaves no room"));
}

TEST(HopperPlan, MoreRowsOfOneHeadThanFitAreUnsuited) {
  EXPECT_EQ(Call(128, 1, 600).Plan().unsuited,
            "600 rows of one head, want at most 512 with head_dim=128");
}

}  // namespace
}  // namespace keepset::kernels::cuda
