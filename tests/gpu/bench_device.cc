#include "tests/gpu/bench_device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/bench_kernels.h"
#include "tests/gpu/bench_report.h"

namespace keepset::gpu {
namespace {

// Beyond twice what the host took to queue the work before.
constexpr int64_t kLeastLeadNanoseconds = 1'000'000;
// Of the L2 cache: its policy is not to throw out the oldest line always.
constexpr int64_t kFlushTimesL2 = 4;

}  // namespace

void Require(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "gpu_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

void Require(cudaError_t error) {
  if (error != cudaSuccess) Require(absl::InternalError(cudaGetErrorString(error)));
}

DeviceMemory::DeviceMemory(int64_t bytes) {
  if (cudaMalloc(&data_, static_cast<size_t>(bytes)) == cudaSuccess) return;
  data_ = nullptr;
  cudaGetLastError();  // The caller sees it by data().
}

DeviceMemory::~DeviceMemory() {
  if (cudaFree(data_) != cudaSuccess) std::fprintf(stderr, "gpu_bench: cudaFree failed\n");
}

void FillRandom(std::byte* data, int64_t bytes, uint32_t seed) {
  constexpr int64_t kChunk = int64_t{1} << 22;
  std::vector<uint16_t> values(kChunk / sizeof(uint16_t));
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  for (uint16_t& value : values) {
    const float x = normal(rng);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16);
  }
  for (int64_t at = 0; at < bytes; at += kChunk) {
    const void* const from = at == 0 ? static_cast<const void*>(values.data()) : data;
    Require(cudaMemcpy(data + at, from, static_cast<size_t>(std::min(kChunk, bytes - at)),
                       cudaMemcpyDefault));
  }
  // Copies within a device are not waited for, nor is the last part of one from pageable memory.
  Require(cudaDeviceSynchronize());
}

DeviceTimer::DeviceTimer(cudaStream_t stream) : stream_(stream) {
  int device = 0;
  int l2_bytes = 0;
  Require(cudaGetDevice(&device));
  Require(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device));
  flush_bytes_ = kFlushTimesL2 * l2_bytes;
  flush_ = std::make_unique<DeviceMemory>(std::max<int64_t>(flush_bytes_, 1));
  if (flush_->data() == nullptr) Require(absl::ResourceExhaustedError("device memory"));
  Require(cudaMemset(flush_->data(), 0, static_cast<size_t>(flush_bytes_)));
  Require(cudaDeviceSynchronize());
  Require(cudaEventCreate(&begin_));
  Require(cudaEventCreate(&end_));
}

DeviceTimer::~DeviceTimer() {
  static_cast<void>(cudaEventDestroy(begin_));
  static_cast<void>(cudaEventDestroy(end_));
}

DeviceTimes DeviceTimer::Measure(int repetitions, const std::function<void()>& queue,
                                 const std::function<void()>& wait) {
  constexpr int kWarmUps = 5;
  double host_milliseconds = 0.0;
  for (int i = 0; i < kWarmUps; ++i) {
    host_milliseconds = HostMilliseconds(queue);
    wait();
  }
  const auto lead = kLeastLeadNanoseconds + static_cast<int64_t>(2e6 * host_milliseconds);
  DeviceTimes times;
  size_t free_before = 0;
  size_t free_after = 0;
  size_t all_bytes = 0;
  Require(cudaMemGetInfo(&free_before, &all_bytes));
  for (int i = 0; i < repetitions; ++i) {
    Require(QueueRead(flush_->data(), flush_bytes_, stream_));
    Require(QueueDelay(lead, stream_));
    Require(cudaEventRecord(begin_, stream_));
    queue();
    const cudaError_t has_begun = cudaEventQuery(begin_);
    if (has_begun == cudaErrorNotReady) {
      ++times.host_ahead;
    } else {
      Require(has_begun);
    }
    Require(cudaEventRecord(end_, stream_));
    wait();
    Require(cudaEventSynchronize(end_));
    float elapsed = 0.0f;
    Require(cudaEventElapsedTime(&elapsed, begin_, end_));
    times.milliseconds.push_back(elapsed);
  }
  Require(cudaMemGetInfo(&free_after, &all_bytes));
  times.allocated_bytes = static_cast<int64_t>(free_before) - static_cast<int64_t>(free_after);
  return times;
}

void AddDeviceTimes(const DeviceTimes& times, nlohmann::ordered_json* line) {
  AddTimes("device_ms", times.milliseconds, line);
  (*line)["repetitions"] = times.milliseconds.size();
  (*line)["host_ahead"] =
      static_cast<double>(times.host_ahead) / static_cast<double>(times.milliseconds.size());
  (*line)["allocated_bytes"] = times.allocated_bytes;
}

}  // namespace keepset::gpu
