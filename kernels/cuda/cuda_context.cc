#include "kernels/cuda/cuda_context.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/callers_stream.h"
#include "kernels/cuda/current_device.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/piece_bounds.h"
#include "kernels/cuda/relaxed_capture.h"

namespace keepset::kernels::cuda {
namespace {

// Block tables, row positions and keep sets of a layer.
constexpr int64_t kFirstRingBytes = int64_t{256} << 10;
constexpr int64_t kFaultBytes = kMaxFaults * int64_t{sizeof(uint64_t)};
constexpr int kAllOnes = 0xff;

int64_t Aligned(int64_t bytes) {
  constexpr int64_t kAlignment = StreamState::kUploadAlignment;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t MostTemporaryBytes(const DevicePool& pool) {
  if (!pool.is_fixed()) return kMaxTemporaryBytes;
  return std::min(kMaxTemporaryBytes, pool.use().reserved_bytes / kFixedPerTemporary);
}

}  // namespace

StreamState::StreamState(const DeviceTraits& traits, DeviceHealth& health, DevicePool& pool)
    : traits_(traits),
      health_(health),
      pool_(pool),
      most_temporary_bytes_(MostTemporaryBytes(pool)),
      results_(health),
      faults_host_(health) {}

StreamState::~StreamState() {
  if (own_stream_ == nullptr) {
    deferred_->Close();
    return;
  }
  const RelaxedCapture capture(health_);
  health_.Check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize").IgnoreError();
  deferred_->Close();
  health_.Check(cudaStreamDestroy(own_stream_), "cudaStreamDestroy").IgnoreError();
}

absl::Status StreamState::Prepare() {
  if (!is_queued() || faults_host_.bytes() > 0) return absl::OkStatus();
  if (own_stream_ == nullptr) KEEPSET_RETURN_IF_ERROR(NewOwnStream());
  return faults_host_.Reserve(kFaultBytes);
}

absl::Status StreamState::NewOwnStream() {
  int least_priority = 0;
  int greatest_priority = 0;
  KEEPSET_RETURN_IF_CUDA_ERROR(
      health_, cudaDeviceGetStreamPriorityRange(&least_priority, &greatest_priority));
  // In the engine's process its own streams go first.
  return health_.Check(
      cudaStreamCreateWithPriority(&own_stream_, cudaStreamNonBlocking, least_priority),
      "cudaStreamCreateWithPriority");
}

absl::Status StreamState::TakeFaults() {
  if (faults_.bytes() > 0) return absl::OkStatus();
  KEEPSET_ASSIGN_OR_RETURN(faults_, pool_.Acquire(kFaultBytes));
  return Queue("cudaMemsetAsync",
               [&] { return cudaMemsetAsync(faults_.data(), kAllOnes, kFaultBytes, stream()); });
}

absl::StatusOr<std::byte*> StreamState::Workspace(int64_t bytes) {
  if (bytes > workspace_.bytes()) {
    deferred_->Add(std::move(workspace_));
    workspace_ = DeviceBlock();
    KEEPSET_ASSIGN_OR_RETURN(workspace_, pool_.Acquire(bytes));
  }
  OpenBytes(workspace_.data(), bytes);
  return workspace_.data();
}

absl::StatusOr<std::byte*> StreamState::Temporary(int64_t bytes) {
  KEEPSET_ASSIGN_OR_RETURN(DeviceBlock block, pool_.Acquire(std::max<int64_t>(bytes, 1)));
  std::byte* const data = block.data();
  deferred_->Add(std::move(block));
  temporary_bytes_ += bytes;
  return data;
}

absl::StatusOr<std::unique_ptr<PinnedBuffer>> StreamState::TakeRingHost(int64_t bytes) {
  const auto found = std::find_if(spare_rings_.begin(), spare_rings_.end(),
                                  [bytes](const auto& ring) { return ring->bytes() >= bytes; });
  if (found != spare_rings_.end()) {
    std::unique_ptr<PinnedBuffer> host = std::move(*found);
    spare_rings_.erase(found);
    return host;
  }
  auto host = std::make_unique<PinnedBuffer>(health_);
  KEEPSET_RETURN_IF_ERROR(host->Reserve(bytes));
  return host;
}

int64_t StreamState::ring_bytes() const {
  // Either may be larger than it was asked for.
  return ring_host_ == nullptr ? ring_.bytes() : std::min(ring_.bytes(), ring_host_->bytes());
}

absl::Status StreamState::GrowRing(int64_t bytes) {
  const int64_t size = std::max({bytes, 2 * ring_.bytes(), kFirstRingBytes});
  KEEPSET_ASSIGN_OR_RETURN(DeviceBlock block, pool_.Acquire(size));
  std::unique_ptr<PinnedBuffer> host;
  if (is_queued()) {
    KEEPSET_ASSIGN_OR_RETURN(host, TakeRingHost(size));
  }
  deferred_->Add(std::move(ring_));
  if (ring_host_ != nullptr) old_rings_.push_back(std::move(ring_host_));
  ring_ = std::move(block);
  CloseBytes(ring_.data(), ring_.bytes());
  ring_host_ = std::move(host);
  ring_used_ = 0;
  return absl::OkStatus();
}

void StreamState::PutRingAway() {
  ring_ = DeviceBlock();
  if (ring_host_ != nullptr) spare_rings_.push_back(std::move(ring_host_));
}

absl::StatusOr<const std::byte*> StreamState::Upload(const void* data, int64_t bytes) {
  if (ring_used_ + bytes > ring_bytes()) {
    KEEPSET_RETURN_IF_ERROR(GrowRing(bytes));
  }
  std::byte* const device = ring_.data() + ring_used_;
  OpenBytes(device, bytes);
  if (bytes > 0) {
    KEEPSET_RETURN_IF_ERROR(Queue("cudaMemcpyAsync", [&] {
      std::byte* const host = ring_host_->data() + ring_used_;
      std::memcpy(host, data, static_cast<size_t>(bytes));
      return cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                             stream());
    }));
  }
  ring_used_ += Aligned(bytes);
  return device;
}

absl::Status StreamState::ReserveUploads(int64_t bytes) {
  KEEPSET_RETURN_IF_ERROR(Wait());
  if (bytes <= ring_bytes()) return absl::OkStatus();
  PutRingAway();
  return GrowRing(bytes);
}

absl::Status StreamState::Keep(int64_t bytes) {
  if (bytes <= kept_.bytes()) {
    OpenBytes(kept_.data(), bytes);
    return absl::OkStatus();
  }
  kept_ = DeviceBlock();
  KEEPSET_ASSIGN_OR_RETURN(kept_, pool_.Acquire(bytes));
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> StreamState::Results(int64_t bytes) {
  KEEPSET_RETURN_IF_ERROR(results_.Reserve(bytes));
  return results_.data();
}

absl::Status StreamState::ReserveFaults(int64_t count) {
  KEEPSET_CHECK(count <= kMaxFaults);
  KEEPSET_RETURN_IF_ERROR(TakeFaults());
  const bool has_room = static_cast<int64_t>(describe_.size()) + count <= kMaxFaults;
  if (has_room && !has_many_temporaries()) return absl::OkStatus();
  absl::Status status = Wait();
  if (pending_.ok()) pending_ = std::move(status);
  return health_.status();
}

uint64_t* StreamState::NewFault(std::function<absl::Status(uint64_t code)> describe) {
  KEEPSET_CHECK(static_cast<int64_t>(describe_.size()) < kMaxFaults);
  describe_.push_back(std::move(describe));
  return reinterpret_cast<uint64_t*>(faults_.data()) + (describe_.size() - 1);
}

absl::Status StreamState::ReadFaults() {
  const auto* codes = reinterpret_cast<const uint64_t*>(faults_host_.data());
  for (size_t i = 0; i < describe_.size(); ++i) {
    if (codes[i] != kNoFault) return describe_[i](codes[i]);
  }
  return absl::OkStatus();
}

void StreamState::ForgetQueued() {
  describe_.clear();
  deferred_->Flush();
  for (std::unique_ptr<PinnedBuffer>& ring : old_rings_) {
    if (pool_.is_fixed()) spare_rings_.push_back(std::move(ring));
  }
  old_rings_.clear();
  CloseBytes(ring_.data(), ring_.bytes());
  ring_used_ = 0;
  temporary_bytes_ = 0;
}

absl::Status StreamState::Wait() {
  if (!is_queued()) {
    ForgetQueued();
    return absl::OkStatus();
  }
  absl::Status status;
  if (!describe_.empty()) {
    const size_t bytes = describe_.size() * sizeof(uint64_t);
    status = health_.Check(cudaMemcpyAsync(faults_host_.data(), faults_.data(), bytes,
                                           cudaMemcpyDeviceToHost, stream()),
                           "cudaMemcpyAsync");
    status.Update(health_.Check(cudaMemsetAsync(faults_.data(), kAllOnes, bytes, stream()),
                                "cudaMemsetAsync"));
  }
  status.Update(health_.Check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize"));
  absl::Status earlier = std::move(pending_);
  pending_ = absl::OkStatus();
  if (status.ok()) status = earlier;
  if (status.ok()) status = ReadFaults();
  ForgetQueued();
  return status;
}

absl::Status StreamState::Reset() {
  used_.fill(false);
  // Nothing is queued into a graph, and nothing is to end its capture.
  KEEPSET_RETURN_IF_ERROR(CheckNotInCapture(callers_stream_, health_));
  // Whatever the operation found concerns nobody any more, but the device's own errors do.
  const bool has_faults = !describe_.empty();
  describe_.clear();
  pending_ = absl::OkStatus();
  if (has_faults) {
    KEEPSET_RETURN_IF_ERROR(Queue("cudaMemsetAsync", [&] {
      return cudaMemsetAsync(faults_.data(), kAllOnes, kFaultBytes, stream());
    }));
  }
  // Null: nothing was ever queued.
  if (stream() != nullptr) {
    KEEPSET_RETURN_IF_CUDA_ERROR(health_, cudaStreamSynchronize(stream()));
  }
  ForgetQueued();
  deferred_->Close();
  callers_stream_ = nullptr;
  kept_ = DeviceBlock();
  CloseBytes(workspace_.data(), workspace_.bytes());
  if (pool_.is_fixed()) {
    workspace_ = DeviceBlock();
    faults_ = DeviceBlock();
    PutRingAway();
  }
  return absl::OkStatus();
}

void StreamState::Abandon() {
  workspace_.Leak();
  kept_.Leak();
  ring_.Leak();
  faults_.Leak();
  deferred_->Leak();
  // Copies to and from them may be queued, too.
  if (ring_host_ != nullptr) ring_host_->Leak();
  for (const std::unique_ptr<PinnedBuffer>& ring : old_rings_) ring->Leak();
  results_.Leak();
  faults_host_.Leak();
  callers_stream_ = nullptr;
  own_stream_ = nullptr;  // a call that would end a capture
}

std::unique_ptr<StreamState> StreamPool::Acquire(cudaStream_t stream) {
  std::unique_ptr<StreamState> state = TakeIdle();
  if (state == nullptr) state = std::make_unique<StreamState>(traits_, health_, pool_);
  state->Begin(stream);
  return state;
}

std::unique_ptr<StreamState> StreamPool::TakeIdle() {
  const absl::MutexLock lock(&mutex_);
  if (idle_.empty()) return nullptr;
  std::unique_ptr<StreamState> state = std::move(idle_.back());
  idle_.pop_back();
  return state;
}

void StreamPool::Release(std::unique_ptr<StreamState> state) {
  const absl::StatusOr<CurrentDevice> current = CurrentDevice::Set(traits_.ordinal, health_);
  if (!current.ok()) return;
  if (!state->Reset().ok()) {
    // The caller's stream is in capture, or gone, and what was queued may still run.
    if (health_.status().ok()) state->Abandon();
    return;
  }
  const absl::MutexLock lock(&mutex_);
  idle_.push_back(std::move(state));
}

CudaScoreBuffer::~CudaScoreBuffer() {
  if (last_stream_ != nullptr) last_stream_->Add(std::move(block_));
}

absl::StatusOr<float*> CudaScoreBuffer::Use(StreamState& state) {
  last_stream_ = state.deferred();
  if (!is_written_) {
    KEEPSET_RETURN_IF_ERROR(state.Queue("cudaMemsetAsync", [&] {
      return cudaMemsetAsync(block_.data(), 0, static_cast<size_t>(bytes()), state.stream());
    }));
    is_written_ = true;
  }
  return data();
}

float* CudaScoreBuffer::Overwrite(StreamState& state) {
  last_stream_ = state.deferred();
  is_written_ = true;
  return data();
}

}  // namespace keepset::kernels::cuda
