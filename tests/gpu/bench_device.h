// What the parts of gpu_bench need of a device: memory, and the time that work takes on it.
#ifndef KEEPSET_TESTS_GPU_BENCH_DEVICE_H_
#define KEEPSET_TESTS_GPU_BENCH_DEVICE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"

namespace keepset::gpu {

// End the program with the reason: a benchmark has nothing to go on with.
void Require(const absl::Status& status);
void Require(cudaError_t error);

// Null data where the device has no room.
class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
};

// Random bf16 values of a normal distribution, repeated every 4 MiB.
void FillRandom(std::byte* data, int64_t bytes, uint32_t seed);

// There for every stream.
template <typename Value>
std::unique_ptr<DeviceMemory> OnDevice(const std::vector<Value>& values) {
  const size_t bytes = values.size() * sizeof(Value);
  auto memory = std::make_unique<DeviceMemory>(static_cast<int64_t>(bytes));
  Require(cudaMemcpy(memory->data(), values.data(), bytes, cudaMemcpyHostToDevice));
  // A copy of pageable memory returns when it is staged, and only the default stream waits for it.
  Require(cudaDeviceSynchronize());
  return memory;
}

struct DeviceTimes {
  std::vector<double> milliseconds;
  int host_ahead = 0;           // repetitions that were queued before the device began with them
  int64_t allocated_bytes = 0;  // device memory that all of them together took
};

// Times work on one stream by events around it. Not thread-safe.
class DeviceTimer {
 public:
  explicit DeviceTimer(cudaStream_t stream);
  ~DeviceTimer();
  DeviceTimer(const DeviceTimer&) = delete;
  DeviceTimer& operator=(const DeviceTimer&) = delete;

  // What the device takes for what `queue` queues; `wait` waits for the stream. Warm-ups first, in
  // which workspaces grow. Each repetition begins with nothing of use in the L2 cache, and the
  // stream is held up until the host is done, so that no gap between launches is counted;
  // host_ahead says how often that succeeded: never, when `queue` waits for the device.
  DeviceTimes Measure(int repetitions, const std::function<void()>& queue,
                      const std::function<void()>& wait);

 private:
  const cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  std::unique_ptr<DeviceMemory> flush_;  // read to fill the L2 cache
  int64_t flush_bytes_ = 0;
};

// Adds device_ms, its p99, the number of repetitions, and the rest of `times` to a line.
void AddDeviceTimes(const DeviceTimes& times, nlohmann::ordered_json* line);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_BENCH_DEVICE_H_
