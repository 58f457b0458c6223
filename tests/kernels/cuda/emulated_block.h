// A block of the emulated device: its threads as fibers, its shared memory, and what they meet at.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_EMULATED_BLOCK_H_
#define KEEPSET_TESTS_KERNELS_CUDA_EMULATED_BLOCK_H_

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
#include "tests/kernels/cuda/fiber.h"
#include "tests/kernels/cuda/guarded_memory.h"
#include "tests/kernels/cuda/hopper_emulator.h"
#include "tests/kernels/cuda/race_check.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels::cuda {

// Long enough for a warp to finish a tile of a kernel while another has not begun; the naps of
// other blocks are short.
constexpr uint32_t kRoundsAsleep = 256;

struct PendingCopy {
  std::byte* to;
  std::byte bytes[16];
  bool has_arrived = false;
};

class EmulatedBlock : public FiberBlock {
 public:
  // shared: shape.shared_bytes, which nobody else uses meanwhile.
  EmulatedBlock(const LaunchShape& shape, int x, int y, int z,
                const std::function<void(const EmulatedThread&)>& body, const GuardedMemory& shared,
                FiberPool* fibers, RaceCheck* races, std::mt19937* rng)
      : shape_(shape),
        x_(x),
        y_(y),
        z_(z),
        body_(body),
        shared_(shared),
        races_(*races),
        rng_(*rng),
        hopper_(this) {
    KEEPSET_CHECK(shape.threads % kWarpLanes == 0);
    threads_.reserve(static_cast<size_t>(shape.threads));
    for (int i = 0; i < shape.threads; ++i) threads_.emplace_back(this, i);
    states_.resize(static_cast<size_t>(shape.threads));
    warps_.resize(static_cast<size_t>(shape.threads / kWarpLanes));
    shared_.Fill();
    for (int i = 0; i < shape.threads; ++i) {
      states_[i].fiber = &fibers->At(static_cast<size_t>(i));
      states_[i].fiber->Begin([this, i] { body_(threads_[i]); });
    }
  }

  void Run() {
    std::vector<int> order(states_.size());
    std::iota(order.begin(), order.end(), 0);
    size_t left = states_.size();
    auto asleep = static_cast<uint32_t>(rng_());  // bit per warp
    const uint32_t rounds_asleep = (rng_() & 1u) != 0 ? kRoundsAsleep : 1;
    // Lanes of a warp may be far apart, too: in half of the blocks a thread, often of the first
    // warp, goes on only where nobody else can.
    const size_t last_choices = (rng_() & 1u) != 0 ? kWarpLanes : states_.size();
    const int last = (rng_() & 1u) != 0 ? static_cast<int>(rng_() % last_choices) : -1;
    bool has_moved = true;
    while (left > 0) {
      std::shuffle(order.begin(), order.end(), rng_);
      // Some warps sleep for a while, so that others run far ahead unless a barrier holds them.
      if (!has_moved || rng_() % rounds_asleep == 0) asleep = static_cast<uint32_t>(rng_());
      const int waiting = has_moved ? last : -1;
      has_moved = false;
      bool can_move = false;
      for (const int i : order) {
        State& state = states_[i];
        if (state.fiber->is_done() ||
            (state.waits_for != nullptr && *state.waits_for == state.seen)) {
          continue;
        }
        can_move = true;
        if (i == waiting || ((asleep >> (i / kWarpLanes)) & 1u) != 0) continue;
        has_moved = true;
        state.waits_for = nullptr;
        RaceCheck::Enter(&races_, i, state.fiber->stack(), Fiber::kStackBytes);
        state.fiber->Resume();
        left -= state.fiber->is_done() ? 1 : 0;
      }
      RaceCheck::Enter(nullptr, 0, nullptr, 0);
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
  int num_threads() const override { return shape_.threads; }
  std::byte* shared() const override { return shared_.data(); }
  int64_t shared_bytes() const override { return shape_.shared_bytes; }
  std::mt19937& rng() override { return rng_; }
  RaceCheck& races() override { return races_; }
  HopperUnits& hopper() { return hopper_; }

  void Barrier(int thread) {
    if (++at_barrier_ == static_cast<int>(states_.size())) {
      at_barrier_ = 0;
      races_.SyncBlock();
      ++barrier_phase_;
      return;
    }
    Wait(thread, &barrier_phase_);
  }

  // All lanes have released before one acquires.
  void SyncWarp(int thread, int collective) {
    const Warp& warp = warps_[thread / kWarpLanes];
    races_.Release(&warp, thread);
    if (warp.arrived + 1 == kWarpLanes) races_.CompletePhase(&warp);
    Exchange(thread, collective, &thread, sizeof(thread));
    races_.Acquire(&warp, thread);
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

  void StartCopy(int thread, PendingCopy copy) {
    hopper_.NoteCopy(thread, copy.to);
    races_.StartCopy(thread, copy.to, sizeof(copy.bytes));
    // Every second one arrives at once, the others as late as they may.
    copy.has_arrived = (rng_() & 1u) != 0;
    if (copy.has_arrived) std::memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
    states_[thread].open_copies.push_back(copy);
  }
  void CommitCopies(int thread) {
    State& state = states_[thread];
    state.groups.push_back(std::move(state.open_copies));
    state.open_copies.clear();
  }
  void WaitCopies(int thread, int newest) {
    State& state = states_[thread];
    while (static_cast<int>(state.groups.size()) > newest) {
      for (const PendingCopy& copy : state.groups.front()) {
        races_.EndCopy(thread, copy.to, sizeof(copy.bytes));
        if (!copy.has_arrived) std::memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
      }
      state.groups.pop_front();
    }
  }

  void Wait(int thread, const uint64_t* phase) override {
    State& state = states_[thread];
    state.waits_for = phase;
    state.seen = *phase;
    state.fiber->Suspend();
  }

 private:
  struct State {
    Fiber* fiber = nullptr;
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

  const LaunchShape& shape_;
  const int x_;
  const int y_;
  const int z_;
  const std::function<void(const EmulatedThread&)>& body_;
  const GuardedMemory& shared_;
  RaceCheck& races_;
  std::mt19937& rng_;
  HopperUnits hopper_;
  std::vector<EmulatedThread> threads_;
  std::vector<State> states_;
  std::vector<Warp> warps_;
  int at_barrier_ = 0;
  uint64_t barrier_phase_ = 0;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_EMULATED_BLOCK_H_
