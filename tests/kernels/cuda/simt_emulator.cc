#include "tests/kernels/cuda/simt_emulator.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <random>

#include "base/check.h"
#include "tests/kernels/cuda/emulated_block.h"
#include "tests/kernels/cuda/hopper_emulator.h"
#include "tests/kernels/cuda/race_check.h"

namespace keepset::kernels::cuda {
namespace {

std::atomic<uint32_t> g_seed = 1;  // of the next launch

}  // namespace

int EmulatedThread::num_threads() const { return block_->shape().threads; }
int EmulatedThread::block_x() const { return block_->x(); }
int EmulatedThread::block_y() const { return block_->y(); }
int EmulatedThread::block_z() const { return block_->z(); }
int EmulatedThread::grid_x() const { return static_cast<int>(block_->shape().grid_x); }
int EmulatedThread::grid_y() const { return static_cast<int>(block_->shape().grid_y); }
std::byte* EmulatedThread::shared() const { return block_->shared(); }
void EmulatedThread::SyncBlock() const { block_->Barrier(thread_); }

void EmulatedThread::SyncWarp() const { block_->SyncWarp(thread_, kSyncWarp); }

const std::byte* EmulatedThread::Exchange(Collective collective, const void* data,
                                          size_t bytes) const {
  return block_->Exchange(thread_, collective, data, bytes);
}

uint32_t EmulatedThread::Ballot(bool vote) const {
  const std::byte* const slots = Exchange(kBallot, &vote, sizeof(vote));
  uint32_t bits = 0;
  for (int i = 0; i < kWarpLanes; ++i) {
    bits |= slots[i * kSlotBytes] != std::byte{0} ? 1u << i : 0u;
  }
  return bits;
}

uint32_t EmulatedThread::MatchAny(uint32_t value) const {
  const std::byte* const slots = Exchange(kMatch, &value, sizeof(value));
  uint32_t bits = 0;
  for (int i = 0; i < kWarpLanes; ++i) {
    bits |= std::memcmp(slots + i * kSlotBytes, &value, sizeof(value)) == 0 ? 1u << i : 0u;
  }
  return bits;
}

void EmulatedThread::CopyAsync16(std::byte* to, const std::byte* from, bool valid) const {
  KEEPSET_CHECK(reinterpret_cast<uintptr_t>(to) % 16 == 0);
  PendingCopy copy = {to, {}, false};
  if (valid) {
    KEEPSET_CHECK(reinterpret_cast<uintptr_t>(from) % 16 == 0);
    block_->races().Read(from, sizeof(copy.bytes));
    std::memcpy(copy.bytes, from, sizeof(copy.bytes));
  }
  block_->StartCopy(thread_, copy);
}

void EmulatedThread::CommitCopies() const { block_->CommitCopies(thread_); }
void EmulatedThread::WaitCopies(int newest) const { block_->WaitCopies(thread_, newest); }

void EmulatedThread::AddShared(uint32_t* to, uint32_t value) const {
  block_->races().Atomic(to, sizeof(*to));
  *to += value;
}
void EmulatedThread::MinShared(uint32_t* to, uint32_t value) const {
  block_->races().Atomic(to, sizeof(*to));
  *to = std::min(*to, value);
}
// Nothing of a launch reads what is joined so in global memory.
void EmulatedThread::MinGlobal(uint64_t* to, uint64_t value) const { *to = std::min(*to, value); }

// ldmatrix .x4: lane 8 i + j brings the address of row j of matrix i; lane l receives of each
// matrix elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
void EmulatedThread::LoadMatrix4(uint32_t* out, const std::byte* row) const {
  KEEPSET_CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0);
  const std::byte* const slots = Exchange(kLoadMatrix, &row, sizeof(row));
  for (int matrix = 0; matrix < 4; ++matrix) {
    const std::byte* from;
    std::memcpy(&from, slots + (matrix * 8 + lane() / 4) * kSlotBytes, sizeof(from));
    block_->races().Read(from + lane() % 4 * 4, sizeof(uint32_t));
    std::memcpy(&out[matrix], from + lane() % 4 * 4, sizeof(uint32_t));
  }
}

// mma .m16n8k16, fragments as the PTX manual lays them out: with g = lane / 4 and i = lane % 4,
// a[0] holds A[g][2i..], a[1] A[g + 8][2i..], a[2] A[g][2i + 8..], a[3] A[g + 8][2i + 8..]; b0
// holds B[2i..][g], b1 B[2i + 8..][g]; c holds C[g][2i], C[g][2i + 1], C[g + 8][2i], C[g + 8][2i +
// 1].
void EmulatedThread::Multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1,
                              DType type) const {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const std::byte* const slots = Exchange(kMultiply, mine, sizeof(mine));
  const auto element = [&](int from_lane, int word, int k) {
    uint32_t pair;
    std::memcpy(&pair, slots + from_lane * kSlotBytes + word * sizeof(uint32_t), sizeof(pair));
    const auto bits = static_cast<uint16_t>(k % 2 == 0 ? pair & 0xffffu : pair >> 16);
    return type == DType::kF16 ? HalfBitsToFloat(bits) : BfloatBitsToFloat(bits);
  };
  for (int j = 0; j < 4; ++j) {
    const int row = lane() / 4 + 8 * (j / 2);
    const int column = 2 * (lane() % 4) + j % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int pair_lane = k % 8 / 2;
      const float x = element(row % 8 * 4 + pair_lane, row / 8 + 2 * (k / 8), k);
      const float y = element(column * 4 + pair_lane, 4 + k / 8, k);
      sum += x * y;
    }
    c[j] += sum;
  }
}

void EmulateGrid(const LaunchShape& shape,
                 const std::function<void(const EmulatedThread& thread)>& body) {
  constexpr uint32_t kStep = 0x9e3779b9;  // seeds that tests set side by side stay apart
  std::mt19937 rng(g_seed.fetch_add(kStep));
  thread_local FiberPool fibers;
  constexpr size_t kSharedAlignment = 16;
  const GuardedMemory shared(static_cast<size_t>(shape.shared_bytes), kSharedAlignment);
  RaceCheck races(shape.threads, shared.data(), shape.shared_bytes);
  std::vector<int64_t> order(static_cast<size_t>(shape.grid_x * shape.grid_y * shape.grid_z));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::shuffle(order.begin(), order.end(), rng);
  for (const int64_t i : order) {
    races.BeginBlock(i);
    EmulatedBlock(shape, static_cast<int>(i % shape.grid_x),
                  static_cast<int>(i / shape.grid_x % shape.grid_y),
                  static_cast<int>(i / shape.grid_x / shape.grid_y), body, shared, &fibers, &races,
                  &rng)
        .Run();
  }
}

HopperUnits& EmulatedThread::hopper() const { return block_->hopper(); }

void SetEmulationSeed(uint32_t seed) { g_seed = seed; }

}  // namespace keepset::kernels::cuda
