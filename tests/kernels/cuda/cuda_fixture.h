// A CUDA backend beside its CPU twin, and tensors in device memory. The same tests run against the
// emulator (KEEPSET_EMULATED_DEVICE) and against a device, where they are larger. Memory that an op
// is to fill holds NaN before it: what the backend allocates comes as bytes of 0xff
// (poisoned_malloc.cc on a device), and what it used before can be poisoned here.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_CUDA_FIXTURE_H_
#define KEEPSET_TESTS_KERNELS_CUDA_CUDA_FIXTURE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compute_backend.h"
#include "kernels/views.h"
#include "tests/kernels/kernel_test_support.h"

namespace keepset::kernels {

#if defined(KEEPSET_EMULATED_DEVICE)
constexpr bool kIsEmulated = true;
#else
constexpr bool kIsEmulated = false;
#endif

// Whether this machine has a driver and a device. Where it has, whatever else keeps a backend from
// starting is a failure: after an error that leaves the device unusable the runtime says the same
// of it as of none.
bool HasDevice();

// Device memory with a copy of host bytes, there for every stream.
class DeviceBytes {
 public:
  explicit DeviceBytes(const std::vector<std::byte>& bytes);
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes();

  std::byte* data() const { return data_; }
  std::vector<std::byte> Read() const;

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A K or V tensor, its memory on the device.
class DeviceKv {
 public:
  explicit DeviceKv(const KvTensor& tensor);
  KvView view() const;
  MutableKvView mutable_view() const;
  std::vector<std::byte> Read() const { return memory_.Read(); }

 private:
  DeviceBytes memory_;
  std::vector<int32_t> block_table_;
  KvView shape_;
};

// Queries, a tile or a log-sum-exp on the device.
class DeviceDense {
 public:
  explicit DeviceDense(const DenseTensor& tensor);
  QueryView queries() const;
  TileView tile() const;
  LseView lse() const;

 private:
  DeviceBytes memory_;
  QueryView queries_;
  TileView tile_;
  LseView lse_;
};

// A backend with one context.
struct Machine {
  std::unique_ptr<ComputeBackend> backend;
  std::unique_ptr<OpContext> context;

  // Filled with NaN.
  std::unique_ptr<ScoreBuffer> Buffer(int64_t rows, int64_t cols) const;
  std::unique_ptr<ScoreBuffer> Buffer(int64_t rows, int64_t cols,
                                      const std::vector<float>& values) const;
  std::vector<float> Values(const ScoreBuffer& buffer) const;
  // Fills memory that the backend keeps for later ops with NaN, so that none finds the results of
  // the one before: blocks of up to 256 KiB, several of each size.
  void PoisonKeptMemory() const;
};

class CudaTest : public ::testing::Test {
 protected:
  // A failure names KEEPSET_TEST_SEED where it is set.
  CudaTest();
  // Skips, with the reason, where there is no device.
  void SetUp() override;

  Machine cuda_;
  Machine cpu_;

 private:
  std::optional<::testing::ScopedTrace> trace_;
};

}  // namespace keepset::kernels

#endif  // KEEPSET_TESTS_KERNELS_CUDA_CUDA_FIXTURE_H_
