// Finds what threads of an emulated launch do to the same memory with nothing that orders them: two
// accesses, one of them a write, or a plain one beside an atomic one. Whatever order the threads
// ran in: an access is judged by the barriers that the threads have passed, not by when it
// happened.
//
// The compiler reports the accesses: emulated_launch.cc is instrumented as for ThreadSanitizer, and
// race_check.cc is the runtime of that. What the emulator does for a thread it reports itself. Warp
// collectives but SyncWarp order nothing, as on a device: neither do they order lanes that store to
// the same place.
//
// Blocks of a launch are never ordered. In a block, SyncBlock orders all before it and all after
// it. Hopper's barriers order as release and acquire, by clocks of each thread (Lamport's vectors).
#ifndef KEEPSET_TESTS_KERNELS_CUDA_RACE_CHECK_H_
#define KEEPSET_TESTS_KERNELS_CUDA_RACE_CHECK_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

namespace keepset::kernels::cuda {

class RaceCheck;

// Global memory of one launch.
class GlobalRaces {
 public:
  enum class Access { kRead, kWrite };
  struct Toucher {
    int64_t block = -1;
    int32_t thread = 0;
    uint32_t epoch = 0;  // of the block, from 1 on
    uint32_t clock = 0;
    bool are_many = false;  // threads of this epoch
    bool are_many_blocks = false;
  };
  // `by` is the thread of `check` that does it.
  void Touch(const RaceCheck& check, uintptr_t address, size_t bytes, Access access,
             const Toucher& by);

 private:
  struct Cell {
    Toucher writer;
    Toucher reader;
  };
  static bool IsOrdered(const RaceCheck& check, const Toucher& before, const Toucher& by);

  std::unordered_map<uintptr_t, Cell> cells_;
};

// The blocks of a launch, one after the other. Sees nothing unless KEEPSET_CHECKS_RACES is defined,
// as it is with instrumented kernels.
class RaceCheck {
 public:
  RaceCheck(int threads, const std::byte* shared, int64_t shared_bytes);
  RaceCheck(const RaceCheck&) = delete;
  RaceCheck& operator=(const RaceCheck&) = delete;

  void BeginBlock(int64_t block);
  // Whether what `other` did then is before what `thread` does now.
  bool IsOrdered(int thread, int other, uint32_t epoch, uint32_t clock) const;
  // Accesses of this host thread are from now on those of `thread`, which has its stack at `stack`;
  // null: of nobody.
  static void Enter(RaceCheck* check, int thread, const std::byte* stack, size_t stack_bytes);

  void Read(const void* data, size_t bytes);
  void Write(const void* data, size_t bytes);
  // By an instruction that is atomic among its like; of shared memory.
  void Atomic(const void* data, size_t bytes);
  // An asynchronous copy into shared memory that nobody may touch before it has arrived.
  void StartCopy(int thread, const void* to, size_t bytes);
  void EndCopy(int thread, const void* to, size_t bytes);
  // By that thread, whoever runs.
  void ReadBy(int thread, const void* data, size_t bytes);
  void WriteBy(int thread, const void* data, size_t bytes);

  // All threads are at a barrier.
  void SyncBlock();
  // What the thread has done is before what those do who acquire the phase that completes next.
  void Release(const void* barrier, int thread);
  void CompletePhase(const void* barrier);
  void Acquire(const void* barrier, int thread);

 private:
  struct Toucher {
    uint32_t epoch = 0;
    int32_t thread = -1;
    bool are_many = false;
  };
  struct Cell {
    uint32_t write_epoch = 0;
    uint32_t write_clock = 0;
    int32_t writer = -1;
    int32_t copier = -1;  // of the copy that is on its way
    Toucher reader;
    Toucher atomic;
    int32_t reads = -1;  // of reader.epoch, in reads_; -1 without clocks
  };
  struct Reads {
    std::vector<std::pair<int, uint32_t>> few;  // threads and their clocks
    std::vector<uint32_t> all;                  // [threads] instead, where they are many
  };
  struct Phases {
    std::vector<uint32_t> next;  // [threads]
    std::vector<uint32_t> done;
  };

  // Calls visit(cell) for those of shared memory; false for other memory.
  template <typename Visit>
  bool VisitShared(const void* data, size_t bytes, const Visit& visit);
  bool HasOther(const Toucher& toucher, int thread) const;
  void Note(Toucher* toucher, int thread) const;
  void CheckRead(const Cell& cell, int thread) const;
  void CheckWrite(const Cell& cell, int thread) const;
  void NoteWrite(Cell* cell, int thread) const;
  void NoteClock(Cell* cell, int thread);
  void TouchGlobal(int thread, const void* data, size_t bytes, GlobalRaces::Access access);
  uint32_t ClockOf(int thread) const;
  void UseClocks();

  GlobalRaces global_;
  int64_t block_ = 0;
  const size_t threads_;
  const uintptr_t shared_;
  const size_t shared_bytes_;
  std::vector<Cell> cells_;
  std::vector<Reads> reads_;
  int64_t copies_ = 0;  // on their way, counted by cells
  uint32_t epoch_ = 1;
  // Empty while nobody has used Hopper's barriers.
  std::vector<uint32_t> clocks_;              // [threads]
  std::vector<std::vector<uint32_t>> known_;  // [threads] of [threads]
  std::map<const void*, Phases> phases_;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_RACE_CHECK_H_
