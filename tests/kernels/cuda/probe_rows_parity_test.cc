// Rows that lie behind the prompt see all of it and nothing else, whatever fills its last tile.
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tests/fakes/test_seed.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

// fp32 sums in two orders, and the device's approximate exponential.
constexpr float kTolerance = 1e-4f;

class ProbeRows : public CudaTest {};

TEST_F(ProbeRows, ColumnsAreThoseOfTheCpu) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const int64_t seq_len : {5, 64, 300, 513}) {
      std::mt19937 rng(fakes::TestSeed(7));
      const DenseTensor q(RandomValues(rng, 4 * 4 * 16, dtype), 4, 4, 16, dtype);
      const KvTensor k(RandomValues(rng, 2 * seq_len * 16, dtype), 2, seq_len, 16, dtype,
                       Layout::kNhd, 16, 8);
      const DeviceDense device_q(q);
      const DeviceKv device_k(k);
      const std::vector<int64_t> positions = {seq_len - 1, seq_len, seq_len + 70, 1 << 30};
      const auto columns = [&](const Machine& machine, const QueryView& queries,
                               const KvView& keys) {
        WindowArgs args;
        args.q = queries;
        args.k = keys;
        args.row_positions = positions;
        args.softmax_scale = 0.25f;
        const std::unique_ptr<ScoreBuffer> out = machine.Buffer(4, seq_len);
        const absl::Status status = machine.backend->WindowColumns(*machine.context, args, *out);
        EXPECT_TRUE(status.ok()) << status;
        return machine.Values(*out);
      };
      const std::vector<float> want = columns(cpu_, q.queries(), k.view());
      const std::vector<float> got = columns(cuda_, device_q.queries(), device_k.view());
      for (size_t i = 0; i < want.size(); ++i) {
        ASSERT_NEAR(got[i], want[i], kTolerance * want[i]) << "seq_len " << seq_len << " at " << i;
      }
    }
  }
}

}  // namespace
}  // namespace keepset::kernels
