// Window scores with products by cuBLAS against plain fp64 loops: over a library of plain loops on
// the emulator, over the real one on a device.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_CUBLAS_FIXTURE_H_
#define KEEPSET_TESTS_KERNELS_CUDA_CUBLAS_FIXTURE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/window_fixture.h"
#include "tests/kernels/kernel_test_support.h"
#if defined(KEEPSET_EMULATED_DEVICE)
#include "tests/fakes/fake_libcublas.h"
#endif

namespace keepset::kernels {

// Of a backend with window kernels "cublas"; on the emulator over the fake library.
BackendOptions CublasOptions();
#if defined(KEEPSET_EMULATED_DEVICE)
// Of a fake library, which is loaded once in a process.
fakes::FakeCublas& TheFakeCublas(const char* file = KEEPSET_FAKE_LIBCUBLAS);
#endif

// Why there can be no such backend: this build or this machine has no library. Empty: whatever
// keeps one from being made is a failure.
std::string WhyNoCublas(const BackendOptions& options);

class CublasParity : public CudaTest {
 protected:
  using Shape = WindowCaseOf<77, 32, 8>;

  // Skips, with the reason, where there is no device or no library.
  void SetUp() override;
  void TearDown() override;

  // Columns of the backend; says in name_ what made them.
  absl::StatusOr<std::vector<float>> Columns(const Shape& shape, const WindowTensors& tensors,
                                             const DenseTensor* lse = nullptr,
                                             std::vector<float>* norms = nullptr);
  void ExpectNearOracle(const Shape& shape);
  void ExpectValueNorms(const Shape& shape);

  std::string name_;
};

}  // namespace keepset::kernels

#endif  // KEEPSET_TESTS_KERNELS_CUDA_CUBLAS_FIXTURE_H_
