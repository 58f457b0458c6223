#include "kernels/cuda/device_memory.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/current_device.h"
#include "kernels/cuda/piece_bounds.h"
#include "kernels/cuda/relaxed_capture.h"

namespace keepset::kernels::cuda {
namespace {

// Sizes are rounded up so that prompts of similar length share blocks.
int64_t RoundUp(int64_t bytes) {
  constexpr int64_t kLarge = int64_t{2} << 20;
  if (bytes >= kLarge) return (bytes + kLarge - 1) / kLarge * kLarge;
  int64_t size = 512;
  while (size < bytes) size *= 2;
  return size;
}

}  // namespace

DeviceBlock::~DeviceBlock() {
  if (pool_ != nullptr) pool_->Release(data_, bytes_);
}

DevicePool::~DevicePool() {
  const absl::MutexLock lock(&mutex_);
  FreeKept();
}

DeviceMemoryUse DevicePool::use() const {
  if (is_fixed()) return region_->use();
  const absl::MutexLock lock(&mutex_);
  return {used_bytes_ + kept_bytes_, used_bytes_, peak_bytes_};
}

void DevicePool::NoteUse(int64_t change) {
  used_bytes_ += change;
  peak_bytes_ = std::max(peak_bytes_, used_bytes_);
}

absl::StatusOr<DeviceBlock> DevicePool::Acquire(int64_t bytes) {
  if (is_fixed()) {
    KEEPSET_ASSIGN_OR_RETURN(std::byte* const data, region_->Take(bytes));
    return DeviceBlock(this, data, bytes);
  }
  const int64_t size = RoundUp(bytes);
  {
    const absl::MutexLock lock(&mutex_);
    const auto found = kept_.lower_bound(size);
    // A block that is much too large is worth more to others.
    if (found != kept_.end() && found->first / 2 <= size) {
      DeviceBlock block(this, found->second, found->first);
      kept_bytes_ -= found->first;
      NoteUse(found->first);
      kept_.erase(found);
      OpenBytes(block.data(), bytes);
      return block;
    }
  }
  KEEPSET_ASSIGN_OR_RETURN(const CurrentDevice current, CurrentDevice::Set(device_, health_));
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, static_cast<size_t>(size));
  if (error == cudaErrorMemoryAllocation) {
    {
      const absl::MutexLock lock(&mutex_);
      FreeKept();
    }
    error = cudaMalloc(&data, static_cast<size_t>(size));
    cudaGetLastError();  // Nobody else is to find that there was none.
  }
  if (error == cudaErrorMemoryAllocation) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cuda: device ", device_, " has no ", size, " bytes of free memory"));
  }
  KEEPSET_RETURN_IF_ERROR(health_.Check(error, "cudaMalloc"));
  {
    const absl::MutexLock lock(&mutex_);
    NoteUse(size);
  }
  CloseBytes(static_cast<std::byte*>(data) + bytes, size - bytes);
  return DeviceBlock(this, static_cast<std::byte*>(data), size);
}

void DevicePool::Release(std::byte* data, int64_t bytes) {
  if (is_fixed()) return region_->Return(data, bytes);
  {
    const absl::MutexLock lock(&mutex_);
    NoteUse(-bytes);
    CloseBytes(data, bytes);
    if (kept_bytes_ + bytes <= most_kept_bytes_) {
      kept_.emplace(bytes, data);
      kept_bytes_ += bytes;
      return;
    }
  }
  const RelaxedCapture capture(health_);
  // Nobody can be told; a sticky error is remembered.
  health_.Check(cudaFree(data), "cudaFree").IgnoreError();
}

void DevicePool::FreeKept() {
  if (kept_.empty()) return;
  const RelaxedCapture capture(health_);
  for (const auto& [bytes, data] : kept_) {
    health_.Check(cudaFree(data), "cudaFree").IgnoreError();
  }
  kept_.clear();
  kept_bytes_ = 0;
}

void DeferredBlocks::Add(DeviceBlock block) {
  const absl::MutexLock lock(&mutex_);
  if (leaks_) {
    block.Leak();
  } else if (!is_closed_) {
    blocks_.push_back(std::move(block));
  }
}

void DeferredBlocks::Flush() {
  std::vector<DeviceBlock> done;
  const absl::MutexLock lock(&mutex_);
  done.swap(blocks_);
}

void DeferredBlocks::Close() {
  Flush();
  const absl::MutexLock lock(&mutex_);
  is_closed_ = true;
}

void DeferredBlocks::Open() {
  const absl::MutexLock lock(&mutex_);
  is_closed_ = false;
}

void DeferredBlocks::Leak() {
  const absl::MutexLock lock(&mutex_);
  leaks_ = true;
  for (DeviceBlock& block : blocks_) block.Leak();
  blocks_.clear();
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ == nullptr) return;
  const RelaxedCapture capture(health_);
  health_.Check(cudaFreeHost(data_), "cudaFreeHost").IgnoreError();
}

absl::Status PinnedBuffer::Reserve(int64_t bytes) {
  if (bytes <= bytes_) return absl::OkStatus();
  const int64_t size = std::max(bytes, 2 * bytes_);
  const RelaxedCapture capture(health_);
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, static_cast<size_t>(size), cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // Nobody else is to find that there was none.
    return absl::ResourceExhaustedError(
        absl::StrCat("cuda: there are no ", size, " bytes of page-locked host memory"));
  }
  KEEPSET_RETURN_IF_ERROR(health_.Check(error, "cudaHostAlloc"));
  if (data_ != nullptr) KEEPSET_RETURN_IF_CUDA_ERROR(health_, cudaFreeHost(data_));
  data_ = static_cast<std::byte*>(data);
  bytes_ = size;
  return absl::OkStatus();
}

}  // namespace keepset::kernels::cuda
