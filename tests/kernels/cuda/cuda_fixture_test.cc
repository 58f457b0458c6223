// What the parity tests rest on: memory holds NaN until an op has written it.
#include "tests/kernels/cuda/cuda_fixture.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compute_backend.h"

namespace keepset::kernels {
namespace {

class CudaFixture : public CudaTest {
 protected:
  static int64_t CountNumbers(const std::vector<float>& values) {
    int64_t count = 0;
    for (const float value : values) count += std::isnan(value) ? 0 : 1;
    return count;
  }
};

TEST_F(CudaFixture, NewMemoryIsPoisoned) {
  constexpr size_t kBytes = 4099;
  void* data = nullptr;
  ASSERT_EQ(cudaMalloc(&data, kBytes), cudaSuccess);
  std::vector<std::byte> bytes(kBytes);
  EXPECT_EQ(cudaMemcpy(bytes.data(), data, kBytes, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(cudaFree(data), cudaSuccess);
  EXPECT_EQ(bytes, std::vector<std::byte>(kBytes, std::byte{0xff}));
}

TEST_F(CudaFixture, ABufferIsPoisoned) {
  EXPECT_EQ(CountNumbers(cuda_.Values(*cuda_.Buffer(3, 77))), 0);
}

}  // namespace
}  // namespace keepset::kernels
