// What the check of races finds in kernels that the emulator runs.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/launch.h"
#include "tests/kernels/cuda/simt_emulator.h"

// How the compiler reports accesses of instrumented kernels.
extern "C" {
void __tsan_read4(const void* data);
void __tsan_write4(const void* data);
}

namespace keepset::kernels::cuda {
namespace {

using Kernel = std::function<void(const EmulatedThread&)>;

// Blocks of 64 threads with 256 bytes of shared memory.
void RunKernel(int blocks, const Kernel& kernel) {
  LaunchShape shape;
  shape.grid_x = blocks;
  shape.grid_y = shape.grid_z = 1;
  shape.threads = 64;
  shape.shared_bytes = 256;
  EmulateGrid(shape, kernel);
}

uint32_t* Words(const EmulatedThread& thread) {
  return reinterpret_cast<uint32_t*>(thread.shared());
}

void Read(const uint32_t* from) { __tsan_read4(from); }
void Write(const uint32_t* to) { __tsan_write4(to); }

void ExpectRace(int blocks, const Kernel& kernel) {
  EXPECT_DEATH(RunKernel(blocks, kernel), "race in");
}

TEST(RaceCheckDeathTest, ThreadsWithWordsOfTheirOwnRaceNot) {
  RunKernel(2, [](const EmulatedThread& thread) {
    Write(Words(thread) + thread.thread());
    Read(Words(thread) + thread.thread());
  });
}

TEST(RaceCheckDeathTest, AReadNeedsABarrierBehindTheWrite) {
  const auto kernel = [](const EmulatedThread& thread, bool has_barrier) {
    if (thread.thread() == 3) Write(Words(thread));
    if (has_barrier) thread.SyncBlock();
    if (thread.thread() == 40) Read(Words(thread));
  };
  RunKernel(1, [&](const EmulatedThread& thread) { kernel(thread, true); });
  ExpectRace(1, [&](const EmulatedThread& thread) { kernel(thread, false); });
}

// As where a tile is filled again.
TEST(RaceCheckDeathTest, AWriteNeedsABarrierBehindTheRead) {
  const auto kernel = [](const EmulatedThread& thread, bool has_barrier) {
    Read(Words(thread));
    if (has_barrier) thread.SyncBlock();
    if (thread.thread() == 63) Write(Words(thread));
  };
  RunKernel(1, [&](const EmulatedThread& thread) { kernel(thread, true); });
  ExpectRace(1, [&](const EmulatedThread& thread) { kernel(thread, false); });
}

TEST(RaceCheckDeathTest, AShuffleOrdersNoMemory) {
  ExpectRace(1, [](const EmulatedThread& thread) {
    if (thread.thread() == 0) Write(Words(thread));
    thread.ShuffleXor(0, 1);
    if (thread.thread() == 1) Read(Words(thread));
  });
}

// Which of them is last is not defined.
TEST(RaceCheckDeathTest, LanesStoreToOnePlaceBehindASyncWarpOnly) {
  uint32_t word = 0;
  const auto kernel = [&word](const EmulatedThread& thread, bool syncs) {
    if (thread.thread() == 0) Write(&word);
    if (syncs) thread.SyncWarp();
    if (thread.thread() == 1) Write(&word);
  };
  RunKernel(1, [&](const EmulatedThread& thread) { kernel(thread, true); });
  ExpectRace(1, [&](const EmulatedThread& thread) { kernel(thread, false); });
}

TEST(RaceCheckDeathTest, AtomicsRaceWithPlainAccessesOnly) {
  const auto kernel = [](const EmulatedThread& thread, bool has_barrier) {
    thread.AddShared(Words(thread), 1);
    if (has_barrier) thread.SyncBlock();
    if (thread.thread() == 5) Read(Words(thread));
  };
  RunKernel(1, [](const EmulatedThread& thread) { thread.AddShared(Words(thread), 1); });
  RunKernel(1, [&](const EmulatedThread& thread) { kernel(thread, true); });
  ExpectRace(1, [&](const EmulatedThread& thread) { kernel(thread, false); });
}

TEST(RaceCheckDeathTest, NothingOrdersBlocks) {
  std::vector<uint32_t> words(64);
  const auto kernel = [&words](const EmulatedThread& thread, bool is_shared) {
    const int mine = is_shared ? 0 : thread.block_x();
    thread.SyncBlock();
    if (thread.thread() == 0) Write(words.data() + mine);
    thread.SyncBlock();
  };
  RunKernel(2, [&](const EmulatedThread& thread) { kernel(thread, false); });
  ExpectRace(2, [&](const EmulatedThread& thread) { kernel(thread, true); });
}

TEST(RaceCheckDeathTest, ACopyOnItsWayIsNotRead) {
  alignas(16) static const std::byte source[16] = {};
  const auto kernel = [](const EmulatedThread& thread, bool waits) {
    if (thread.thread() == 0) {
      thread.CopyAsync16(thread.shared(), source, true);
      thread.CommitCopies();
      if (waits) thread.WaitCopies<0>();
      Read(Words(thread));
      thread.WaitCopies<0>();
    }
  };
  RunKernel(1, [&](const EmulatedThread& thread) { kernel(thread, true); });
  ExpectRace(1, [&](const EmulatedThread& thread) { kernel(thread, false); });
}

}  // namespace
}  // namespace keepset::kernels::cuda
