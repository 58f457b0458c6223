#include "tests/kernels/cuda/hopper_fixture.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/fakes/test_seed.h"
#if defined(KEEPSET_EMULATED_DEVICE)
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"
#endif

namespace keepset::kernels {
namespace {

std::vector<double> Oracle(const WindowCase& shape, const Attention& attention) {
  if (shape.heads.empty()) {
    return ReduceOracle(attention.tile, shape.num_kv_heads * shape.group, shape.num_rows,
                        shape.seq_len, shape.reduction);
  }
  std::vector<double> columns;
  for (const HeadRows& one : shape.heads) {
    const auto begin =
        attention.tile.begin() + (one.head * shape.num_rows + one.first_row) * shape.seq_len;
    const std::vector<double> rows(begin, begin + one.num_rows * shape.seq_len);
    const std::vector<double> reduced =
        ReduceOracle(rows, 1, one.num_rows, shape.seq_len, one.reduction);
    columns.insert(columns.end(), reduced.begin(), reduced.end());
  }
  return columns;
}

}  // namespace

WindowTensors RandomWindow(const WindowCase& shape, uint32_t seed) {
  std::mt19937 rng(fakes::TestSeed(seed));
  const int64_t heads = shape.num_kv_heads * shape.group;
  const int64_t kv_values = shape.num_kv_heads * shape.seq_len * shape.head_dim;
  const auto q = RandomValues(rng, heads * shape.num_rows * shape.head_dim, shape.dtype, 1.5f);
  const auto k = RandomValues(rng, kv_values, shape.dtype);
  const auto v = RandomValues(rng, kv_values, shape.dtype);
  const auto tensor = [&](const std::vector<float>& values) {
    return KvTensor(values, shape.num_kv_heads, shape.seq_len, shape.head_dim, shape.dtype,
                    shape.layout, shape.block_size, shape.gap);
  };
  return {DenseTensor(q, heads, shape.num_rows, shape.head_dim, shape.dtype), tensor(k), tensor(v),
          shape.row_positions.empty() ? LastPositions(shape.num_rows, shape.seq_len)
                                      : shape.row_positions,
          1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
}

void HopperParity::SetUp() {
#if defined(KEEPSET_EMULATED_DEVICE)
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm90);
#endif
  absl::StatusOr<std::unique_ptr<ComputeBackend>> backend =
      NewCudaBackend({.window_kernels = "hopper"});
  if (!backend.ok() && !kIsEmulated) GTEST_SKIP() << backend.status().message();
  ASSERT_TRUE(backend.ok()) << backend.status();
  absl::StatusOr<std::unique_ptr<OpContext>> context = (*backend)->NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  cuda_.backend = *std::move(backend);
  cuda_.context = *std::move(context);
  cpu_.backend = CpuBackend();
  context = cpu_.backend->NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  cpu_.context = *std::move(context);
}
void HopperParity::TearDown() {
  cuda_.context.reset();
  cuda_.backend.reset();
#if defined(KEEPSET_EMULATED_DEVICE)
  cuda::SetEmulationSeed(1);
  cuda::SetEmulatedDevice(cuda::EmulatedDevice::kSm86);
#endif
}

absl::StatusOr<std::vector<float>> HopperParity::Columns(const WindowCase& shape,
                                                         const WindowTensors& tensors,
                                                         const DenseTensor* lse,
                                                         std::vector<float>* norms) {
  const DeviceDense q(tensors.q);
  const DeviceKv k(tensors.k);
  const DeviceKv v(tensors.v);
  std::optional<DeviceDense> device_lse;
  WindowArgs args;
  args.q = q.queries();
  args.k = k.view();
  args.row_positions = tensors.row_positions;
  if (lse != nullptr) {
    device_lse.emplace(*lse);
    args.window_lse = device_lse->lse();
  }
  args.softmax_scale = tensors.scale;
  args.reduction = shape.reduction;
  args.what = "layer 3";
  args.heads = shape.heads;
  const int64_t rows = shape.heads.empty() ? shape.num_kv_heads * shape.group
                                           : static_cast<int64_t>(shape.heads.size());
  std::unique_ptr<ScoreBuffer> norm_buffer;
  if (norms != nullptr) {
    norm_buffer = cuda_.Buffer(shape.num_kv_heads, shape.seq_len);
    args.v = v.view();
    args.value_norms = norm_buffer.get();
  }
  const std::unique_ptr<ScoreBuffer> out = cuda_.Buffer(rows, shape.seq_len);
  absl::Status status = cuda_.backend->WindowColumns(*cuda_.context, args, *out);
  if (status.ok()) status = cuda_.backend->Wait(*cuda_.context);
  name_ = cuda_.backend->NameFor(*cuda_.context);
  if (!status.ok()) return status;
  if (norms != nullptr) *norms = cuda_.Values(*norm_buffer);
  return cuda_.Values(*out);
}

void HopperParity::ExpectNearOracle(const WindowCase& shape, const std::string& name) {
  const WindowTensors tensors = RandomWindow(shape, 11);
  const Attention attention =
      AttentionOracle(tensors.q, tensors.k, tensors.row_positions, tensors.scale);
  std::optional<DenseTensor> lse;
  if (shape.reference == Reference::kGiven) {
    lse.emplace(std::vector<float>(attention.lse.begin(), attention.lse.end()),
                shape.num_kv_heads * shape.group, shape.num_rows, 1, DType::kF32);
  }
  const absl::StatusOr<std::vector<float>> columns =
      Columns(shape, tensors, lse.has_value() ? &*lse : nullptr);
  ASSERT_TRUE(columns.ok()) << columns.status();
  EXPECT_EQ(name_, name);
  const std::vector<double> want = Oracle(shape, attention);
  ASSERT_EQ(columns->size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR((*columns)[i], want[i], kHopperAbsolute + kHopperRelative * want[i])
        << "row " << i / shape.seq_len << " position " << i % shape.seq_len;
  }
}

}  // namespace keepset::kernels
