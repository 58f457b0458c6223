#include "tests/kernels/cuda/simt_emulator.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>

#include "base/check.h"

namespace keepset::kernels::cuda {
namespace {

constexpr size_t kStackBytes = size_t{128} << 10;
constexpr int kWarpLanes = 32;
// Long enough for a warp to finish a tile of a kernel while another has not begun; the naps of
// other blocks are short.
constexpr uint32_t kRoundsAsleep = 256;

uint32_t g_seed = 1;

// Memory whose end is followed by an inaccessible page.
class GuardedMemory {
 public:
  explicit GuardedMemory(int64_t bytes) {
    const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    const int64_t used = (bytes + page - 1) / page * page;
    mapped_bytes_ = static_cast<size_t>(used + page);
    void* const memory =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    KEEPSET_CHECK(memory != MAP_FAILED);
    mapped_ = static_cast<std::byte*>(memory);
    KEEPSET_CHECK(mprotect(mapped_ + used, static_cast<size_t>(page), PROT_NONE) == 0);
    // Shared memory is aligned to 16 bytes.
    data_ = mapped_ + (used - bytes) / 16 * 16;
    std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(mapped_, mapped_bytes_); }

  std::byte* data() const { return data_; }

 private:
  std::byte* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
};

struct PendingCopy {
  std::byte* to;
  std::byte bytes[16];
};

}  // namespace

class EmulatedBlock {
 public:
  EmulatedBlock(const LaunchShape& shape, int x, int y, int z,
                const std::function<void(const EmulatedThread&)>& body, std::byte* stacks,
                std::mt19937* rng)
      : shape_(shape), x_(x), y_(y), z_(z), body_(body), shared_(shape.shared_bytes), rng_(*rng) {
    KEEPSET_CHECK(shape.threads % kWarpLanes == 0);
    threads_.reserve(static_cast<size_t>(shape.threads));
    for (int i = 0; i < shape.threads; ++i) threads_.emplace_back(this, i);
    fibers_.resize(static_cast<size_t>(shape.threads));
    warps_.resize(static_cast<size_t>(shape.threads / kWarpLanes));
    for (int i = 0; i < shape.threads; ++i) Prepare(i, stacks + i * kStackBytes);
  }

  void Run() {
    std::vector<int> order(fibers_.size());
    std::iota(order.begin(), order.end(), 0);
    size_t left = fibers_.size();
    auto asleep = static_cast<uint32_t>(rng_());  // bit per warp
    const uint32_t rounds_asleep = (rng_() & 1u) != 0 ? kRoundsAsleep : 1;
    bool has_moved = true;
    while (left > 0) {
      std::shuffle(order.begin(), order.end(), rng_);
      // Some warps sleep for a while, so that others run far ahead unless a barrier holds them.
      if (!has_moved || rng_() % rounds_asleep == 0) asleep = static_cast<uint32_t>(rng_());
      has_moved = false;
      bool can_move = false;
      for (const int i : order) {
        Fiber& fiber = fibers_[i];
        if (fiber.is_done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) {
          continue;
        }
        can_move = true;
        if (((asleep >> (i / kWarpLanes)) & 1u) != 0) continue;
        has_moved = true;
        fiber.waits_for = nullptr;
        KEEPSET_CHECK(swapcontext(&scheduler_, &fiber.context) == 0);
        left -= fiber.is_done ? 1 : 0;
      }
      // Some lanes or threads never came to a collective or a barrier.
      KEEPSET_CHECK(can_move);
    }
  }

  const LaunchShape& shape() const { return shape_; }
  int x() const { return x_; }
  int y() const { return y_; }
  int z() const { return z_; }
  std::byte* shared() const { return shared_.data(); }

  void Barrier(int thread) {
    if (++at_barrier_ == static_cast<int>(fibers_.size())) {
      at_barrier_ = 0;
      ++barrier_phase_;
      return;
    }
    Wait(thread, &barrier_phase_);
  }

  const std::byte* Exchange(int thread, int collective, const void* data, size_t bytes) {
    Warp& warp = warps_[thread / kWarpLanes];
    const uint64_t phase = warp.phase;
    std::byte* const slots = warp.slots[phase % 2];
    std::memcpy(slots + thread % kWarpLanes * EmulatedThread::kSlotBytes, data, bytes);
    if (warp.arrived == 0) warp.collective = collective;
    // All lanes are at the same instruction.
    KEEPSET_CHECK(warp.collective == collective);
    if (++warp.arrived == kWarpLanes) {
      warp.arrived = 0;
      ++warp.phase;
    } else {
      Wait(thread, &warp.phase);
    }
    return slots;
  }

  void StartCopy(int thread, const PendingCopy& copy) {
    // Every second one arrives at once, the others as late as they may.
    if ((rng_() & 1u) != 0) {
      std::memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
    } else {
      fibers_[thread].open_copies.push_back(copy);
    }
  }
  void CommitCopies(int thread) {
    Fiber& fiber = fibers_[thread];
    fiber.groups.push_back(std::move(fiber.open_copies));
    fiber.open_copies.clear();
  }
  void WaitCopies(int thread, int newest) {
    Fiber& fiber = fibers_[thread];
    while (static_cast<int>(fiber.groups.size()) > newest) {
      for (const PendingCopy& copy : fiber.groups.front()) std::memcpy(copy.to, copy.bytes, 16);
      fiber.groups.pop_front();
    }
  }

 private:
  struct Fiber {
    ucontext_t context;
    bool is_done = false;
    const uint64_t* waits_for = nullptr;  // until it differs from `seen`
    uint64_t seen = 0;
    std::vector<PendingCopy> open_copies;
    std::deque<std::vector<PendingCopy>> groups;
  };
  struct Warp {
    uint64_t phase = 0;
    int arrived = 0;
    int collective = 0;
    std::byte slots[2][kWarpLanes * EmulatedThread::kSlotBytes];
  };

  static void Enter(uint32_t high, uint32_t low, int thread) {
    auto* block = reinterpret_cast<EmulatedBlock*>((uintptr_t{high} << 32) | low);
    block->body_(block->threads_[thread]);
    block->fibers_[thread].is_done = true;
  }

  void Prepare(int thread, std::byte* stack) {
    ucontext_t& context = fibers_[thread].context;
    KEEPSET_CHECK(getcontext(&context) == 0);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = &scheduler_;
    const auto address = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&EmulatedBlock::Enter), 3,
                static_cast<uint32_t>(address >> 32), static_cast<uint32_t>(address), thread);
  }

  void Wait(int thread, const uint64_t* phase) {
    Fiber& fiber = fibers_[thread];
    fiber.waits_for = phase;
    fiber.seen = *phase;
    KEEPSET_CHECK(swapcontext(&fiber.context, &scheduler_) == 0);
  }

  const LaunchShape& shape_;
  const int x_;
  const int y_;
  const int z_;
  const std::function<void(const EmulatedThread&)>& body_;
  GuardedMemory shared_;
  std::mt19937& rng_;
  std::vector<EmulatedThread> threads_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  int at_barrier_ = 0;
  uint64_t barrier_phase_ = 0;
};

int EmulatedThread::num_threads() const { return block_->shape().threads; }
int EmulatedThread::block_x() const { return block_->x(); }
int EmulatedThread::block_y() const { return block_->y(); }
int EmulatedThread::block_z() const { return block_->z(); }
int EmulatedThread::grid_x() const { return static_cast<int>(block_->shape().grid_x); }
int EmulatedThread::grid_y() const { return static_cast<int>(block_->shape().grid_y); }
std::byte* EmulatedThread::shared() const { return block_->shared(); }
void EmulatedThread::SyncBlock() const { block_->Barrier(thread_); }

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
  PendingCopy copy = {to, {}};
  if (valid) {
    KEEPSET_CHECK(reinterpret_cast<uintptr_t>(from) % 16 == 0);
    std::memcpy(copy.bytes, from, sizeof(copy.bytes));
  }
  block_->StartCopy(thread_, copy);
}

void EmulatedThread::CommitCopies() const { block_->CommitCopies(thread_); }
void EmulatedThread::WaitCopies(int newest) const { block_->WaitCopies(thread_, newest); }

// ldmatrix .x4: lane 8 i + j brings the address of row j of matrix i; lane l receives of each
// matrix elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
void EmulatedThread::LoadMatrix4(uint32_t* out, const std::byte* row) const {
  KEEPSET_CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0);
  const std::byte* const slots = Exchange(kLoadMatrix, &row, sizeof(row));
  for (int matrix = 0; matrix < 4; ++matrix) {
    const std::byte* from;
    std::memcpy(&from, slots + (matrix * 8 + lane() / 4) * kSlotBytes, sizeof(from));
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
  std::mt19937 rng(g_seed);
  // Left uninitialized: most of it is never touched.
  const std::unique_ptr<std::byte[]> stacks(
      new std::byte[static_cast<size_t>(shape.threads) * kStackBytes]);
  std::vector<int64_t> order(static_cast<size_t>(shape.grid_x * shape.grid_y * shape.grid_z));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::shuffle(order.begin(), order.end(), rng);
  for (const int64_t i : order) {
    EmulatedBlock(shape, static_cast<int>(i % shape.grid_x),
                  static_cast<int>(i / shape.grid_x % shape.grid_y),
                  static_cast<int>(i / shape.grid_x / shape.grid_y), body, stacks.get(), &rng)
        .Run();
  }
}

void SetEmulationSeed(uint32_t seed) { g_seed = seed; }

}  // namespace keepset::kernels::cuda
