// Window scores against plain fp64 loops: a case, its random tensors, what a machine makes of them
// and what is right. For the portable kernels and for Hopper's.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_WINDOW_FIXTURE_H_
#define KEEPSET_TESTS_KERNELS_CUDA_WINDOW_FIXTURE_H_

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "absl/status/statusor.h"
#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/fakes/test_seed.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {

// fp32 sums of up to 256 products, and 2^x with two units in the last place.
inline constexpr double kWindowRelative = 2e-4;
inline constexpr double kWindowAbsolute = 1e-7;

enum class Reference { kComputed, kGiven };
enum class Memory { kDevice, kHost };

// The kernels under test differ in what they take, and so in their default case.
template <int64_t kSeqLen, int64_t kHeadDim, int64_t kGap>
struct WindowCaseOf {
  int64_t num_kv_heads = 2;
  int64_t group = 2;
  int64_t num_rows = 5;
  int64_t seq_len = kSeqLen;
  int64_t head_dim = kHeadDim;
  DType dtype = DType::kBF16;
  Layout layout = Layout::kNhd;
  int64_t block_size = 16;
  int64_t gap = kGap;
  RowReduction reduction = RowReduction::kMean;
  Reference reference = Reference::kComputed;
  LogBase lse_base = LogBase::kE;
  Memory memory = Memory::kDevice;
  std::vector<int64_t> row_positions = {};  // empty: the last rows
  std::vector<HeadRows> heads = {};         // empty: all heads

  int64_t num_qo_heads() const { return num_kv_heads * group; }
  int64_t num_outputs() const {
    return heads.empty() ? num_qo_heads() : static_cast<int64_t>(heads.size());
  }
};

struct WindowTensors {
  DenseTensor q;
  KvTensor k;
  KvTensor v;
  std::vector<int64_t> row_positions;
  float scale;
};

template <typename Case>
WindowTensors RandomWindow(const Case& shape, uint32_t seed) {
  std::mt19937 rng(fakes::TestSeed(seed));
  const int64_t kv_values = shape.num_kv_heads * shape.seq_len * shape.head_dim;
  const auto q =
      RandomValues(rng, shape.num_qo_heads() * shape.num_rows * shape.head_dim, shape.dtype, 1.5f);
  const auto k = RandomValues(rng, kv_values, shape.dtype);
  const auto v = RandomValues(rng, kv_values, shape.dtype);
  const auto tensor = [&](const std::vector<float>& values) {
    return KvTensor(values, shape.num_kv_heads, shape.seq_len, shape.head_dim, shape.dtype,
                    shape.layout, shape.block_size, shape.gap);
  };
  return {DenseTensor(q, shape.num_qo_heads(), shape.num_rows, shape.head_dim, shape.dtype),
          tensor(k), tensor(v),
          shape.row_positions.empty() ? LastPositions(shape.num_rows, shape.seq_len)
                                      : shape.row_positions,
          1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
}

// The log-sum-exp that a worker would hand over, where the case gives one.
template <typename Case>
std::optional<DenseTensor> GivenLse(const Case& shape, const Attention& attention) {
  if (shape.reference == Reference::kComputed) return std::nullopt;
  const double unit = shape.lse_base == LogBase::kTwo ? std::log(2.0) : 1.0;
  std::vector<float> values;
  for (const double natural : attention.lse) values.push_back(static_cast<float>(natural / unit));
  return DenseTensor(values, shape.num_qo_heads(), shape.num_rows, 1, DType::kF32);
}

// Columns of `machine`, and its value norms where they are asked for.
template <typename Case>
absl::StatusOr<std::vector<float>> WindowColumnsOn(const Machine& machine, const Case& shape,
                                                   const WindowTensors& tensors,
                                                   const DenseTensor* lse,
                                                   std::vector<float>* norms) {
  const DeviceDense q(tensors.q);
  const DeviceKv k(tensors.k);
  const DeviceKv v(tensors.v);
  std::optional<DeviceDense> device_lse;
  const bool on_device = shape.memory == Memory::kDevice;
  WindowArgs args;
  args.q = on_device ? q.queries() : tensors.q.queries();
  args.k = on_device ? k.view() : tensors.k.view();
  args.row_positions = tensors.row_positions;
  if (lse != nullptr) {
    device_lse.emplace(*lse);
    args.window_lse = on_device ? device_lse->lse() : lse->lse();
    args.window_lse.base = shape.lse_base;
  }
  args.softmax_scale = tensors.scale;
  args.reduction = shape.reduction;
  args.what = "layer 3";
  args.heads = shape.heads;
  std::unique_ptr<ScoreBuffer> norm_buffer;
  if (norms != nullptr) {
    norm_buffer = machine.Buffer(shape.num_kv_heads, shape.seq_len);
    args.v = on_device ? v.view() : tensors.v.view();
    args.value_norms = norm_buffer.get();
  }
  const std::unique_ptr<ScoreBuffer> out = machine.Buffer(shape.num_outputs(), shape.seq_len);
  machine.PoisonKeptMemory();
  absl::Status status = machine.backend->WindowColumns(*machine.context, args, *out);
  // In any case: what was queued before an error still reads the tensors.
  status.Update(machine.backend->Wait(*machine.context));
  if (!status.ok()) return status;
  if (norms != nullptr) *norms = machine.Values(*norm_buffer);
  return machine.Values(*out);
}

template <typename Case>
std::vector<double> WindowOracle(const Case& shape, const Attention& attention) {
  if (shape.heads.empty()) {
    return ReduceOracle(attention.tile, shape.num_qo_heads(), shape.num_rows, shape.seq_len,
                        shape.reduction);
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

inline Attention AttentionOf(const WindowTensors& tensors) {
  return AttentionOracle(tensors.q, tensors.k, tensors.row_positions, tensors.scale);
}

template <typename Case>
void ExpectNear(const std::vector<float>& columns, const Case& shape, const Attention& attention) {
  const std::vector<double> want = WindowOracle(shape, attention);
  ASSERT_EQ(columns.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_NEAR(columns[i], want[i], kWindowAbsolute + kWindowRelative * want[i])
        << "row " << i / shape.seq_len << " position " << i % shape.seq_len;
  }
}

}  // namespace keepset::kernels

#endif  // KEEPSET_TESTS_KERNELS_CUDA_WINDOW_FIXTURE_H_
