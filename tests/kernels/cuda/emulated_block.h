// A block of the emulated device: its threads as fibers, its shared memory, and what they meet at.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_EMULATED_BLOCK_H_
#define KEEPSET_TESTS_KERNELS_CUDA_EMULATED_BLOCK_H_

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/launch.h"
#include "tests/kernels/cuda/hopper_emulator.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels::cuda {

constexpr size_t kStackBytes = size_t{128} << 10;
// Long enough for a warp to finish a tile of a kernel while another has not begun; the naps of
// other blocks are short.
constexpr uint32_t kRoundsAsleep = 256;

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

class EmulatedBlock : public FiberBlock {
 public:
  EmulatedBlock(const LaunchShape& shape, int x, int y, int z,
                const std::function<void(const EmulatedThread&)>& body, std::byte* stacks,
                std::mt19937* rng)
      : shape_(shape),
        x_(x),
        y_(y),
        z_(z),
        body_(body),
        shared_(shape.shared_bytes),
        rng_(*rng),
        hopper_(this) {
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
      // Loads that are on their way may be what everybody waits for. Else some lanes or threads
      // never came to a collective or a barrier.
      if (can_move) {
        hopper_.Advance();
      } else {
        KEEPSET_CHECK(hopper_.DeliverOne());
      }
    }
    hopper_.CheckEnd();
  }

  const LaunchShape& shape() const { return shape_; }
  int x() const { return x_; }
  int y() const { return y_; }
  int z() const { return z_; }
  std::byte* shared() const override { return shared_.data(); }
  int64_t shared_bytes() const override { return shape_.shared_bytes; }
  std::mt19937& rng() override { return rng_; }
  HopperUnits& hopper() { return hopper_; }

  void Barrier(int thread) {
    if (++at_barrier_ == static_cast<int>(fibers_.size())) {
      at_barrier_ = 0;
      ++barrier_phase_;
      return;
    }
    Wait(thread, &barrier_phase_);
  }

  const std::byte* Exchange(int thread, int collective, const void* data, size_t bytes) override {
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
    hopper_.NoteCopy(thread, copy.to);
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

  void Wait(int thread, const uint64_t* phase) override {
    Fiber& fiber = fibers_[thread];
    fiber.waits_for = phase;
    fiber.seen = *phase;
    KEEPSET_CHECK(swapcontext(&fiber.context, &scheduler_) == 0);
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

  const LaunchShape& shape_;
  const int x_;
  const int y_;
  const int z_;
  const std::function<void(const EmulatedThread&)>& body_;
  GuardedMemory shared_;
  std::mt19937& rng_;
  HopperUnits hopper_;
  std::vector<EmulatedThread> threads_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  int at_barrier_ = 0;
  uint64_t barrier_phase_ = 0;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_EMULATED_BLOCK_H_
