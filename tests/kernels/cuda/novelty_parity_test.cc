// Novelty of keys of the CUDA backend: the bits of the CPU twin.
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "tests/fakes/test_seed.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {
namespace {

KvTensor RandomKv(DType dtype, Layout layout, int64_t head_dim, int64_t gap, int64_t seq_len = 53) {
  std::mt19937 rng(fakes::TestSeed(23));
  const auto values = RandomValues(rng, 3 * seq_len * head_dim, dtype);
  return KvTensor(values, 3, seq_len, head_dim, dtype, layout, 16, gap);
}

class NoveltyParity : public CudaTest {
 protected:
  static absl::Status Novelty(const Machine& machine, const KvView& k,
                              const std::vector<int64_t>& heads, std::vector<float>* novelty) {
    const std::unique_ptr<ScoreBuffer> out =
        machine.Buffer(static_cast<int64_t>(heads.size()), k.seq_len);
    absl::Status status =
        machine.backend->KeyNovelty(*machine.context, k, heads, "layer 4: k", *out);
    if (status.ok()) status = machine.backend->Wait(*machine.context);
    if (status.ok()) *novelty = machine.Values(*out);
    return status;
  }

  void ExpectSameBits(const KvTensor& tensor, const std::vector<int64_t>& heads) {
    const DeviceKv device(tensor);
    std::vector<float> got;
    std::vector<float> want;
    ASSERT_TRUE(Novelty(cuda_, device.view(), heads, &got).ok());
    ASSERT_TRUE(Novelty(cpu_, tensor.view(), heads, &want).ok());
    EXPECT_EQ(got, want);
  }
};

TEST_F(NoveltyParity, EveryTypeAndLayout) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kPaged}) {
      ExpectSameBits(RandomKv(dtype, layout, 33, 3), {2, 0, 2});
    }
  }
}

TEST_F(NoveltyParity, MoreChannelsThanThreads) {
  ExpectSameBits(RandomKv(DType::kBF16, Layout::kNhd, 200, 8), {1});
}

TEST_F(NoveltyParity, MoreThanOneChunk) {
  ExpectSameBits(RandomKv(DType::kBF16, Layout::kPaged, 8, 8, 530), {1});
}

TEST_F(NoveltyParity, ZeroKeysAndKeysTooLargeToSquare) {
  KvTensor tensor = RandomKv(DType::kF32, Layout::kNhd, 24, 0);
  for (int64_t c = 0; c < 24; ++c) {
    tensor.Set(1, 17, c, 0.0f);
    tensor.Set(1, 18, c, 1e30f);
  }
  ExpectSameBits(tensor, {1});
}

TEST_F(NoveltyParity, FirstValueThatIsNotFiniteIsNamed) {
  KvTensor tensor = RandomKv(DType::kF32, Layout::kNhd, 24, 0);
  tensor.Set(1, 40, 23, std::numeric_limits<float>::quiet_NaN());
  tensor.Set(1, 30, 0, std::numeric_limits<float>::infinity());
  std::vector<float> novelty;
  EXPECT_EQ(Novelty(cuda_, tensor.view(), {0, 1}, &novelty),
            Novelty(cpu_, tensor.view(), {0, 1}, &novelty));
  EXPECT_EQ(Novelty(cuda_, tensor.view(), {0, 1}, &novelty).message(),
            "layer 4: k: head 1 position 30 is not finite");
  EXPECT_TRUE(Novelty(cuda_, tensor.view(), {0, 2}, &novelty).ok());
}

TEST_F(NoveltyParity, RefusesWhatTheCpuRefuses) {
  const KvTensor tensor = RandomKv(DType::kF32, Layout::kNhd, 24, 0);
  std::vector<float> novelty;
  EXPECT_EQ(Novelty(cuda_, tensor.view(), {3}, &novelty),
            Novelty(cpu_, tensor.view(), {3}, &novelty));
}

}  // namespace
}  // namespace keepset::kernels
