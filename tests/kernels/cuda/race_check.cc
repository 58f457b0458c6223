#include "tests/kernels/cuda/race_check.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace keepset::kernels::cuda {
namespace {

#if defined(KEEPSET_CHECKS_RACES)
constexpr bool kChecksRaces = true;
#else
constexpr bool kChecksRaces = false;
#endif
// The smallest elements of the kernels.
constexpr size_t kCellBytes = 2;

struct Running {
  RaceCheck* check = nullptr;
  int thread = 0;
  uintptr_t stack = 0;
  size_t stack_bytes = 0;
};
thread_local Running running;

[[noreturn]] void Report(const char* memory, const char* what, int64_t block, int thread,
                         int64_t other_block, int other) {
  std::fprintf(stderr, "race in %s memory: %s (block %lld, thread %d; block %lld, thread %d)\n",
               memory, what, static_cast<long long>(block), thread,
               static_cast<long long>(other_block), other);
  std::abort();
}

void Join(std::vector<uint32_t>* clocks, const std::vector<uint32_t>& others) {
  for (size_t i = 0; i < others.size(); ++i) (*clocks)[i] = std::max((*clocks)[i], others[i]);
}

}  // namespace

bool GlobalRaces::IsOrdered(const RaceCheck& check, const Toucher& before, const Toucher& by) {
  if (before.block < 0) return true;
  if (before.block != by.block || before.are_many_blocks) return false;
  if (before.epoch < by.epoch) return true;
  return !before.are_many && check.IsOrdered(by.thread, before.thread, before.epoch, before.clock);
}

void GlobalRaces::Touch(const RaceCheck& check, uintptr_t address, size_t bytes, Access access,
                        const Toucher& by) {
  const auto report = [&](const char* what, const Toucher& before) {
    Report("global", what, by.block, by.thread, before.block, before.thread);
  };
  for (uintptr_t at = address / kCellBytes; at <= (address + bytes - 1) / kCellBytes; ++at) {
    Cell& cell = cells_[at];
    const bool is_read = access == Access::kRead;
    if (!IsOrdered(check, cell.writer, by)) {
      report(is_read ? "read after write" : "write after write", cell.writer);
    }
    const bool is_after_reads = IsOrdered(check, cell.reader, by);
    if (!is_read) {
      if (!is_after_reads) report("write after read", cell.reader);
      cell.writer = by;
      continue;
    }
    const bool are_many_blocks =
        cell.reader.are_many_blocks || (cell.reader.block >= 0 && cell.reader.block != by.block);
    cell.reader = by;
    cell.reader.are_many = !is_after_reads && !are_many_blocks;
    cell.reader.are_many_blocks = are_many_blocks;
  }
}

RaceCheck::RaceCheck(int threads, const std::byte* shared, int64_t shared_bytes)
    : threads_(static_cast<size_t>(threads)),
      shared_(reinterpret_cast<uintptr_t>(shared)),
      shared_bytes_(static_cast<size_t>(shared_bytes)),
      cells_(kChecksRaces ? (shared_bytes_ + kCellBytes - 1) / kCellBytes : 0) {}

void RaceCheck::BeginBlock(int64_t block) {
  block_ = block;
  SyncBlock();
  if (copies_ == 0) return;
  // Those of the block before for which nobody waited.
  for (Cell& cell : cells_) cell.copier = -1;
  copies_ = 0;
}

void RaceCheck::Enter(RaceCheck* check, int thread, const std::byte* stack, size_t stack_bytes) {
  running = {check, thread, reinterpret_cast<uintptr_t>(stack), stack_bytes};
}

template <typename Visit>
bool RaceCheck::VisitShared(const void* data, size_t bytes, const Visit& visit) {
  const size_t offset = reinterpret_cast<uintptr_t>(data) - shared_;
  if (offset >= shared_bytes_) return false;
  const size_t end = std::min(offset + bytes, shared_bytes_);
  for (size_t i = offset / kCellBytes; i * kCellBytes < end; ++i) visit(cells_[i]);
  return true;
}

bool RaceCheck::IsOrdered(int thread, int other, uint32_t epoch, uint32_t clock) const {
  if (epoch < epoch_ || other == thread) return true;
  return !known_.empty() &&
         clock <= known_[static_cast<size_t>(thread)][static_cast<size_t>(other)];
}

bool RaceCheck::HasOther(const Toucher& toucher, int thread) const {
  return toucher.epoch == epoch_ && (toucher.are_many || toucher.thread != thread);
}

void RaceCheck::Note(Toucher* toucher, int thread) const {
  *toucher = {epoch_, thread, HasOther(*toucher, thread)};
}

void RaceCheck::CheckRead(const Cell& cell, int thread) const {
  if (cell.copier >= 0) {
    Report("shared", "read of a copy on its way", block_, thread, block_, cell.copier);
  }
  if (!IsOrdered(thread, cell.writer, cell.write_epoch, cell.write_clock)) {
    Report("shared", "read after write", block_, thread, block_, cell.writer);
  }
}

void RaceCheck::CheckWrite(const Cell& cell, int thread) const {
  if (cell.copier >= 0) {
    Report("shared", "write over a copy on its way", block_, thread, block_, cell.copier);
  }
  if (!IsOrdered(thread, cell.writer, cell.write_epoch, cell.write_clock)) {
    Report("shared", "write after write", block_, thread, block_, cell.writer);
  }
  if (cell.reader.epoch != epoch_) return;
  if (cell.reads < 0) {
    if (!HasOther(cell.reader, thread)) return;
    Report("shared", "write after read", block_, thread, block_, cell.reader.thread);
  }
  const Reads& reads = reads_[static_cast<size_t>(cell.reads)];
  const std::vector<uint32_t>& known = known_[static_cast<size_t>(thread)];
  const auto check = [&](int other, uint32_t clock) {
    if (other == thread || clock <= known[static_cast<size_t>(other)]) return;
    Report("shared", "write after read", block_, thread, block_, other);
  };
  for (const auto& [other, clock] : reads.few) check(other, clock);
  for (size_t i = 0; i < reads.all.size(); ++i) check(static_cast<int>(i), reads.all[i]);
}

void RaceCheck::NoteClock(Cell* cell, int thread) {
  constexpr size_t kFew = 16;
  if (cell->reader.epoch != epoch_) {
    if (cell->reads >= 0) reads_[static_cast<size_t>(cell->reads)] = {};
  } else if (cell->reads < 0) {
    return;  // Read before there were clocks: judged without.
  }
  if (cell->reads < 0) {
    cell->reads = static_cast<int32_t>(reads_.size());
    reads_.emplace_back();
  }
  Reads& reads = reads_[static_cast<size_t>(cell->reads)];
  const uint32_t clock = clocks_[static_cast<size_t>(thread)];
  if (!reads.all.empty()) {
    reads.all[static_cast<size_t>(thread)] = clock;
    return;
  }
  for (auto& [other, seen] : reads.few) {
    if (other == thread) {
      seen = clock;
      return;
    }
  }
  reads.few.emplace_back(thread, clock);
  if (reads.few.size() <= kFew) return;
  reads.all.resize(threads_);
  for (const auto& [other, seen] : reads.few) reads.all[static_cast<size_t>(other)] = seen;
  reads.few.clear();
}

void RaceCheck::NoteWrite(Cell* cell, int thread) const {
  cell->writer = thread;
  cell->write_epoch = epoch_;
  cell->write_clock = ClockOf(thread);
}

uint32_t RaceCheck::ClockOf(int thread) const {
  return clocks_.empty() ? 1 : clocks_[static_cast<size_t>(thread)];
}

void RaceCheck::TouchGlobal(int thread, const void* data, size_t bytes,
                            GlobalRaces::Access access) {
  GlobalRaces::Toucher by;
  by.block = block_;
  by.thread = thread;
  by.epoch = epoch_;
  by.clock = ClockOf(thread);
  global_.Touch(*this, reinterpret_cast<uintptr_t>(data), bytes, access, by);
}

void RaceCheck::ReadBy(int thread, const void* data, size_t bytes) {
  if (!kChecksRaces) return;
  const bool is_shared = VisitShared(data, bytes, [&](Cell& cell) {
    CheckRead(cell, thread);
    if (HasOther(cell.atomic, thread)) {
      Report("shared", "read beside an atomic", block_, thread, block_, cell.atomic.thread);
    }
    if (!clocks_.empty()) NoteClock(&cell, thread);
    Note(&cell.reader, thread);
  });
  if (is_shared) return;
  TouchGlobal(thread, data, bytes, GlobalRaces::Access::kRead);
}

void RaceCheck::WriteBy(int thread, const void* data, size_t bytes) {
  if (!kChecksRaces) return;
  const bool is_shared = VisitShared(data, bytes, [&](Cell& cell) {
    CheckWrite(cell, thread);
    if (HasOther(cell.atomic, thread)) {
      Report("shared", "write beside an atomic", block_, thread, block_, cell.atomic.thread);
    }
    NoteWrite(&cell, thread);
  });
  if (is_shared) return;
  TouchGlobal(thread, data, bytes, GlobalRaces::Access::kWrite);
}

void RaceCheck::Read(const void* data, size_t bytes) { ReadBy(running.thread, data, bytes); }
void RaceCheck::Write(const void* data, size_t bytes) { WriteBy(running.thread, data, bytes); }

void RaceCheck::Atomic(const void* data, size_t bytes) {
  if (!kChecksRaces) return;
  const int thread = running.thread;
  VisitShared(data, bytes, [&](Cell& cell) {
    CheckWrite(cell, thread);
    Note(&cell.atomic, thread);
  });
}

void RaceCheck::StartCopy(int thread, const void* to, size_t bytes) {
  if (!kChecksRaces) return;
  WriteBy(thread, to, bytes);
  VisitShared(to, bytes, [&](Cell& cell) {
    cell.copier = thread;
    ++copies_;
  });
}

void RaceCheck::EndCopy(int thread, const void* to, size_t bytes) {
  if (!kChecksRaces) return;
  VisitShared(to, bytes, [&](Cell& cell) {
    cell.copier = -1;
    --copies_;
  });
  WriteBy(thread, to, bytes);
}

void RaceCheck::SyncBlock() {
  ++epoch_;
  std::fill(clocks_.begin(), clocks_.end(), 1);
  for (std::vector<uint32_t>& known : known_) std::fill(known.begin(), known.end(), 0);
  phases_.clear();
}

void RaceCheck::UseClocks() {
  if (!clocks_.empty()) return;
  clocks_.assign(threads_, 1);
  known_.assign(threads_, std::vector<uint32_t>(threads_, 0));
}

void RaceCheck::Release(const void* barrier, int thread) {
  if (!kChecksRaces) return;
  UseClocks();
  const auto at = static_cast<size_t>(thread);
  Phases& phases = phases_[barrier];
  phases.next.resize(threads_);
  Join(&phases.next, known_[at]);
  phases.next[at] = clocks_[at]++;
}

void RaceCheck::CompletePhase(const void* barrier) {
  if (!kChecksRaces) return;
  Phases& phases = phases_[barrier];
  phases.done.resize(threads_);
  Join(&phases.done, phases.next);
  std::fill(phases.next.begin(), phases.next.end(), 0);
}

void RaceCheck::Acquire(const void* barrier, int thread) {
  if (!kChecksRaces) return;
  UseClocks();
  Join(&known_[static_cast<size_t>(thread)], phases_[barrier].done);
}

#if defined(KEEPSET_CHECKS_RACES)

void RaceCheckAccess(const void* data, size_t bytes, GlobalRaces::Access access) {
  if (running.check == nullptr || bytes == 0 ||
      reinterpret_cast<uintptr_t>(data) - running.stack < running.stack_bytes) {
    return;
  }
  if (access == GlobalRaces::Access::kRead) {
    running.check->Read(data, bytes);
  } else {
    running.check->Write(data, bytes);
  }
}

#endif

}  // namespace keepset::kernels::cuda

#if defined(KEEPSET_CHECKS_RACES)

// What the compiler calls before each access of a file that it instruments.
#define KEEPSET_ACCESSES(bytes)                                                                   \
  void __tsan_read##bytes(const void* data) {                                                     \
    keepset::kernels::cuda::RaceCheckAccess(data, bytes,                                          \
                                            keepset::kernels::cuda::GlobalRaces::Access::kRead);  \
  }                                                                                               \
  void __tsan_write##bytes(const void* data) {                                                    \
    keepset::kernels::cuda::RaceCheckAccess(data, bytes,                                          \
                                            keepset::kernels::cuda::GlobalRaces::Access::kWrite); \
  }                                                                                               \
  void __tsan_unaligned_read##bytes(const void* data) { __tsan_read##bytes(data); }               \
  void __tsan_unaligned_write##bytes(const void* data) { __tsan_write##bytes(data); }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(const void* /*caller*/) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(const void* /*place*/, const void* /*table*/) {}
KEEPSET_ACCESSES(1)
KEEPSET_ACCESSES(2)
KEEPSET_ACCESSES(4)
KEEPSET_ACCESSES(8)
KEEPSET_ACCESSES(16)
void __tsan_read_range(const void* data, size_t bytes) {
  keepset::kernels::cuda::RaceCheckAccess(data, bytes,
                                          keepset::kernels::cuda::GlobalRaces::Access::kRead);
}
void __tsan_write_range(const void* data, size_t bytes) {
  keepset::kernels::cuda::RaceCheckAccess(data, bytes,
                                          keepset::kernels::cuda::GlobalRaces::Access::kWrite);
}

}  // extern "C"

#undef KEEPSET_ACCESSES

#endif
