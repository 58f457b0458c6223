// Hopper's window kernels against plain fp64 loops: a shape, its tensors, and a backend that is
// asked for these kernels.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_HOPPER_FIXTURE_H_
#define KEEPSET_TESTS_KERNELS_CUDA_HOPPER_FIXTURE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

// fp32 sums of up to 256 products, and 2^x with two units in the last place.
constexpr double kHopperRelative = 2e-4;
constexpr double kHopperAbsolute = 1e-7;

constexpr char kByHopper[] = "cuda/sm_90/wgmma";
constexpr char kByPortable[] = "cuda/sm_90";

enum class Reference { kComputed, kGiven };

struct WindowCase {
  int64_t num_kv_heads = 2;
  int64_t group = 2;
  int64_t num_rows = 5;
  int64_t seq_len = 150;
  int64_t head_dim = 64;
  DType dtype = DType::kBF16;
  Layout layout = Layout::kNhd;
  int64_t block_size = 16;
  int64_t gap = 0;
  RowReduction reduction = RowReduction::kMean;
  Reference reference = Reference::kComputed;
  std::vector<int64_t> row_positions = {};  // empty: the last rows
  std::vector<HeadRows> heads = {};         // empty: all heads
};

struct WindowTensors {
  DenseTensor q;
  KvTensor k;
  KvTensor v;
  std::vector<int64_t> row_positions;
  float scale;
};

WindowTensors RandomWindow(const WindowCase& shape, uint32_t seed);

class HopperParity : public CudaTest {
 protected:
  // Skips, with the reason, where a device is no sm_90.
  void SetUp() override;
  void TearDown() override;

  // Columns of the backend; says in name_ which kernels made them.
  absl::StatusOr<std::vector<float>> Columns(const WindowCase& shape, const WindowTensors& tensors,
                                             const DenseTensor* lse = nullptr,
                                             std::vector<float>* norms = nullptr);
  // name: that of the backend which says by what it computed.
  void ExpectNearOracle(const WindowCase& shape, const std::string& name = kByHopper);

  std::string name_;
};

}  // namespace keepset::kernels

#endif  // KEEPSET_TESTS_KERNELS_CUDA_HOPPER_FIXTURE_H_
