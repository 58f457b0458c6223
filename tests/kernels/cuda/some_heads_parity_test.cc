// Queries that hold the observing heads alone give the columns of queries that hold them all.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

class SomeHeads : public CudaTest {};

TEST_F(SomeHeads, ColumnsAreThoseOfAllHeads) {
  constexpr int64_t kSeqLen = 300;
  constexpr int64_t kRows = 16;
  constexpr int64_t kDim = 16;
  const std::vector<int64_t> positions = LastPositions(kRows, kSeqLen);
  const std::vector<HeadRows> of_all = {{1, 0, 16, RowReduction::kMax},
                                        {1, 4, 9, RowReduction::kMean},
                                        {5, 2, 3, RowReduction::kSum},
                                        {7, 0, 16, RowReduction::kLast}};
  std::vector<HeadRows> of_some = of_all;
  const std::vector<int64_t> places = {0, 0, 1, 2};
  for (size_t j = 0; j < of_some.size(); ++j) {
    of_some[j].kv_head = of_all[j].head / 2;
    of_some[j].head = places[j];
  }
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    std::mt19937 rng(7);
    const std::vector<float> values = RandomValues(rng, 8 * kRows * kDim, dtype);
    std::vector<float> some_values;
    for (const int64_t head : {1, 5, 7}) {
      const auto begin = values.begin() + head * kRows * kDim;
      some_values.insert(some_values.end(), begin, begin + kRows * kDim);
    }
    const KvTensor k(RandomValues(rng, 4 * kSeqLen * kDim, dtype), 4, kSeqLen, kDim, dtype,
                     Layout::kNhd, 16, 8);
    const DenseTensor all(values, 8, kRows, kDim, dtype);
    const DenseTensor some(some_values, 3, kRows, kDim, dtype);
    const DeviceDense device_all(all);
    const DeviceDense device_some(some);
    const DeviceKv device_k(k);
    const auto columns = [&](const Machine& machine, const QueryView& queries, const KvView& keys,
                             const std::vector<HeadRows>& heads) {
      WindowArgs args;
      args.q = queries;
      args.k = keys;
      args.row_positions = positions;
      args.softmax_scale = 0.25f;
      args.heads = heads;
      const std::unique_ptr<ScoreBuffer> out = machine.Buffer(4, kSeqLen);
      const absl::Status status = machine.backend->WindowColumns(*machine.context, args, *out);
      EXPECT_TRUE(status.ok()) << status;
      return machine.Values(*out);
    };
    EXPECT_EQ(columns(cuda_, device_some.queries(), device_k.view(), of_some),
              columns(cuda_, device_all.queries(), device_k.view(), of_all));
    // From host memory as well: what is staged is as much as was given.
    EXPECT_EQ(columns(cuda_, some.queries(), k.view(), of_some),
              columns(cuda_, device_all.queries(), device_k.view(), of_all));
  }
}

}  // namespace
}  // namespace keepset::kernels
