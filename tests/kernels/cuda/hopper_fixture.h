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
#include "tests/kernels/cuda/window_fixture.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {

absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options);

constexpr char kByHopper[] = "cuda/sm_90/wgmma";
constexpr char kByPortable[] = "cuda/sm_90";

using WindowCase = WindowCaseOf<150, 64, 0>;

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

  // The value norms beside the columns against those of the CPU.
  void ExpectNormsNearCpu(const WindowCase& shape, const WindowTensors& tensors);
  void ExpectNormsNearCpu(const WindowCase& shape) {
    ExpectNormsNearCpu(shape, RandomWindow(shape, 5));
  }

  std::string name_;
};

}  // namespace keepset::kernels

#endif  // KEEPSET_TESTS_KERNELS_CUDA_HOPPER_FIXTURE_H_
