// How a call is cut into pieces of a fixed size.
#include <cstdint>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cublas_window.h"

namespace keepset::kernels::cuda {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kTable[1] = {};

// Contiguous bf16 keys of `units` KV heads, one layer.
WindowParams Call(int32_t units, int32_t rows, int32_t tokens, int32_t head_dim) {
  WindowParams params;
  DeviceRows& k = params.shape.k;
  k.num_heads = units;
  k.num_tokens = tokens;
  k.head_dim = head_dim;
  k.dtype = DType::kBF16;
  k.head_bytes = int64_t{head_dim} * 2;
  k.token_bytes = units * k.head_bytes;
  params.shape.q_dtype = DType::kBF16;
  params.num_layers = 1;
  params.num_units = units;
  params.num_rows = units * rows;
  params.max_unit_rows = rows;
  return params;
}

int64_t LogitBytes(const CublasPlan& plan) {
  return int64_t{plan.units_at_once} * plan.rows_at_once * plan.tokens_at_once * 4;
}

TEST(CublasPlan, Of8B) {
  const CublasPlan plan = *PlanCublas(Call(8, 256, 32768, 128), "layer 3");
  EXPECT_EQ(plan.keys, KeySource::kWhereTheyLie);
  EXPECT_EQ(plan.units_at_once, 8);
  EXPECT_EQ(plan.rows_at_once, 256);
  EXPECT_EQ(plan.tokens_at_once, 2048);
}

TEST(CublasPlan, WorkspaceDoesNotGrowWithTheTokens) {
  const WindowParams some = Call(8, 256, 4096, 128);
  const WindowParams many = Call(8, 256, 1 << 20, 128);
  const int64_t bytes = CublasWorkspaceBytes(some, *PlanCublas(some, ""));
  EXPECT_EQ(CublasWorkspaceBytes(many, *PlanCublas(many, "")), bytes);
  // Logits, cuBLAS' own, and the queries of a layer.
  EXPECT_LE(bytes, int64_t{22} << 20);
}

TEST(CublasPlan, PiecesHaveALimitForEveryShape) {
  for (const int32_t units : {1, 8, 300}) {
    for (const int32_t rows : {1, 64, 256, 9000, 1 << 20}) {
      for (const int32_t head_dim : {1, 80, 576, 40000}) {
        for (const int32_t* table : {static_cast<const int32_t*>(nullptr), &kTable[0]}) {
          WindowParams params = Call(units, rows, 1 << 20, head_dim);
          params.layers[0].k_table = table;
          const CublasPlan plan = *PlanCublas(params, "");
          EXPECT_LE(LogitBytes(plan), kPieceBytes);
          EXPECT_EQ(plan.tokens_at_once % 8, 0);
          EXPECT_GE(plan.tokens_at_once, 8);
          if (plan.keys == KeySource::kWhereTheyLie) continue;
          EXPECT_LE(int64_t{plan.units_at_once} * plan.tokens_at_once * plan.padded_dim * 2,
                    kPieceBytes);
        }
      }
    }
  }
}

TEST(CublasPlan, KeysThatAreNoMatrixAreCopied) {
  WindowParams params = Call(2, 4, 100, 37);
  EXPECT_EQ(PlanCublas(params, "")->keys, KeySource::kWhereTheyLie);
  params.shape.q_dtype = DType::kF32;
  EXPECT_EQ(PlanCublas(params, "")->keys, KeySource::kCopied);
  EXPECT_EQ(PlanCublas(params, "")->dtype, DType::kF32);
  params = Call(2, 4, 100, 37);
  params.shape.k.token_bytes = 36 * 2;  // rows overlap
  EXPECT_EQ(PlanCublas(params, "")->keys, KeySource::kCopied);
  params = Call(2, 4, 100, 37);
  params.layers[0].k_table = kTable;
  EXPECT_EQ(PlanCublas(params, "")->keys, KeySource::kCopied);
}

TEST(CublasPlan, HeadDimensionOfWhichNoPieceHoldsATokenIsRefused) {
  WindowParams params = Call(1, 1, 8, 2000000);
  EXPECT_TRUE(PlanCublas(params, "").ok());
  params.layers[0].k_table = kTable;
  const absl::Status status = PlanCublas(params, "layer 3").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("layer 3: k: head_dim=2000000, want at most 1048576 with"));
}

}  // namespace
}  // namespace keepset::kernels::cuda
