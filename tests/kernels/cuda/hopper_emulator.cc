#include "tests/kernels/cuda/hopper_emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/element.h"
#include "tests/kernels/cuda/emulated_runtime.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int kGroupThreads = 128;
constexpr int64_t kRegistersOfMultiprocessor = 65536;
constexpr size_t kSlotBytes = 32;
constexpr int kProductDepth = 16;
constexpr int kWarpProductRows = 16;  // of the 64 of a product
// Collectives of this file, apart from those of EmulatedThread.
constexpr int kQueueProduct = 100;
constexpr int kFenceProducts = 101;
constexpr int kCommitProducts = 102;
constexpr int kWaitProducts = 103;

void Require(bool is_so, const char* what) {
  if (is_so) return;
  std::fprintf(stderr, "hopper emulator: %s\n", what);
  std::abort();
}

// 16-byte pieces change places by the number of their 128 bytes, counted from `pattern` on.
uint32_t Swizzle(uint32_t address, int swizzle_bytes, uint32_t pattern) {
  const uint32_t mask = static_cast<uint32_t>(swizzle_bytes / 16 - 1);
  return address ^ ((((address >> 7) - pattern) & mask) << 4);
}

float Poison() { return FloatOfBits(0x7fc0dead); }

}  // namespace

uint32_t OperandAddress(uint64_t descriptor, int row, int channel) {
  constexpr uint64_t kReserved =
      (uint64_t{3} << 14) | (uint64_t{3} << 30) | (uint64_t{7} << 46) | (uint64_t{0x3ff} << 52);
  Require((descriptor & kReserved) == 0, "descriptor with reserved bits");
  const auto start = static_cast<uint32_t>((descriptor & 0x3fff) << 4);
  const auto leading = static_cast<uint32_t>(((descriptor >> 16) & 0x3fff) << 4);
  const auto stride = static_cast<uint32_t>(((descriptor >> 32) & 0x3fff) << 4);
  const auto pattern = static_cast<uint32_t>((descriptor >> 49) & 7);
  const auto mode = static_cast<int>((descriptor >> 62) & 3);
  const auto group = static_cast<uint32_t>(row / 8);
  const auto in_group = static_cast<uint32_t>(row % 8);
  const auto byte = static_cast<uint32_t>(channel) * 2;
  if (mode == 0) {
    // Matrices of 8 rows of 16 bytes.
    return start + group * stride + byte / 16 * leading + in_group * 16 + byte % 16;
  }
  Require(mode != 1 || ((start >> 7) & 7) == pattern,
          "operand that begins within 1024 bytes, and does not say where");
  const int row_bytes = 256 >> mode;  // 1: 128, 2: 64, 3: 32
  const uint32_t place =
      start + group * stride + in_group * static_cast<uint32_t>(row_bytes) + byte;
  return Swizzle(place, row_bytes, pattern);
}

HopperUnits::HopperUnits(FiberBlock* block)
    // Somewhere in the window, aligned to 16 bytes only.
    : block_(*block), window_(1024 + 16 * (block->rng()() % 64)) {}

uint32_t HopperUnits::SharedAddress(const void* pointer) const {
  const auto offset = static_cast<const std::byte*>(pointer) - block_.shared();
  Require(offset >= 0 && offset <= block_.shared_bytes(), "address outside of shared memory");
  return window_ + static_cast<uint32_t>(offset);
}

size_t HopperUnits::GranuleOf(uint32_t address) const {
  Require(address >= window_ && address < window_ + block_.shared_bytes(),
          "operand or tile outside of shared memory");
  return (address - window_) / kGranule;
}

void HopperUnits::NoteCopy(int thread, const std::byte* to) {
  if (granules_.empty()) return;  // A kernel without these units.
  Granule& granule = granules_[GranuleOf(SharedAddress(to))];
  Require(granule.readers == 0, "copy over an operand that is not waited for");
  Require(granule.loads == 0, "copy over a tile that is on its way");
  granule.copied_by = thread;
}

void HopperUnits::InitBarrier(int thread, uint64_t* barrier, int arrivals) {
  if (granules_.empty()) {
    granules_.resize(static_cast<size_t>(block_.shared_bytes() / kGranule + 1));
  }
  Require(SharedAddress(barrier) % 8 == (window_ % 8) && arrivals > 0, "barrier set up wrongly");
  Require(barriers_.count(barrier) == 0, "barrier set up twice");
  Barrier& made = barriers_[barrier];
  made.arrivals = made.pending = arrivals;
  made.owner = thread;
  made.place = barrier;
}

void HopperUnits::FenceBarriers(int thread) {
  for (auto& [place, barrier] : barriers_) {
    if (barrier.owner == thread) barrier.is_fenced = true;
  }
}

HopperUnits::Barrier& HopperUnits::Find(uint64_t* barrier) {
  const auto found = barriers_.find(barrier);
  Require(found != barriers_.end(), "barrier that is not set up");
  Require(found->second.is_fenced, "barrier that is not fenced after its set-up");
  return found->second;
}

void HopperUnits::Complete(Barrier* barrier) {
  if (barrier->pending > 0 || barrier->bytes != 0) {
    Require(barrier->pending > 0 || barrier->bytes > 0, "more bytes than were expected");
    return;
  }
  ++barrier->phase;
  barrier->pending = barrier->arrivals;
  block_.races().CompletePhase(barrier->place);
}

void HopperUnits::Arrive(int thread, uint64_t* barrier, int64_t expected_bytes) {
  Barrier& at = Find(barrier);
  Require(at.pending > 0, "more arrivals than the phase has");
  block_.races().Release(barrier, thread);
  at.bytes += expected_bytes;
  --at.pending;
  Complete(&at);
}

void HopperUnits::WaitPhase(int thread, uint64_t* barrier, uint32_t parity) {
  Require(parity <= 1, "parity is 0 or 1");
  Barrier& at = Find(barrier);
  while ((at.phase & 1) == parity) block_.Wait(thread, &at.phase);
  block_.races().Acquire(barrier, thread);
}

EmulatedTensorMap HopperUnits::CheckMap(const CUtensorMap& map) {
  EmulatedTensorMap encoded;
  Require(reinterpret_cast<uintptr_t>(&map) % 64 == 0, "tensor map that is not aligned");
  std::memcpy(static_cast<void*>(&encoded), static_cast<const void*>(&map), sizeof(encoded));
  Require(encoded.magic == EmulatedTensorMap::kMagic, "tensor map that nobody encoded");
  return encoded;
}

void HopperUnits::LoadBox(int thread, std::byte* to, const CUtensorMap& map,
                          std::initializer_list<int> at, uint64_t* barrier) {
  const Load load = {to, CheckMap(map), at, barrier};
  Require(load.map.rank == at.size(), "coordinates of another rank");
  Find(barrier);
  const uint32_t first = SharedAddress(to);
  Require(first % 128 == 0, "tile that is not aligned to 128 bytes");
  Require(load.map.swizzle_bytes != 128 || first % 1024 == 0, "tile that begins within a swizzle");
  uint32_t bytes = 2;
  for (int i = 0; i < load.map.rank; ++i) bytes *= load.map.box[i];
  for (uint32_t byte = 0; byte < bytes; byte += kGranule) {
    Granule& granule = granules_[GranuleOf(first + byte)];
    Require(granule.readers == 0, "load over an operand that is not waited for");
    Require(granule.loads == 0, "load over a tile that is on its way");
    ++granule.loads;
    granule.copied_by = -1;
  }
  block_.races().WriteBy(thread, to, bytes);
  block_.races().Release(barrier, thread);
  loads_.push_back(load);
}

void HopperUnits::Deliver(size_t index) {
  const Load load = loads_[index];
  loads_.erase(loads_.begin() + static_cast<int64_t>(index));
  const EmulatedTensorMap& map = load.map;
  const uint32_t first = SharedAddress(load.to);
  uint32_t count = 1;
  for (int i = 0; i < map.rank; ++i) count *= map.box[i];
  for (uint32_t i = 0; i < count; ++i) {
    // Dimension 0 runs fastest.
    bool is_inside = true;
    int64_t offset = 0;
    uint32_t rest = i;
    for (int dim = 0; dim < map.rank; ++dim) {
      const int64_t place = load.at[static_cast<size_t>(dim)] + int64_t{rest % map.box[dim]};
      rest /= map.box[dim];
      is_inside = is_inside && place >= 0 && place < static_cast<int64_t>(map.dims[dim]);
      offset += place * static_cast<int64_t>(map.stride_bytes[dim]);
    }
    uint16_t value = 0;
    if (is_inside) std::memcpy(&value, map.data + offset, sizeof(value));
    const uint32_t to = Swizzle(first + 2 * i, map.swizzle_bytes, 0);
    std::memcpy(block_.shared() + (to - window_), &value, sizeof(value));
  }
  for (uint32_t byte = 0; byte < 2 * count; byte += kGranule) {
    --granules_[GranuleOf(first + byte)].loads;
  }
  Barrier& barrier = Find(load.barrier);
  barrier.bytes -= 2 * int64_t{count};
  // Before the arrival that expects them, too.
  if (barrier.pending == 0) Complete(&barrier);
}

void HopperUnits::Advance() {
  if (!loads_.empty() && block_.rng()() % 4 == 0) DeliverOne();
}

bool HopperUnits::DeliverOne() {
  if (loads_.empty()) return false;
  Deliver(block_.rng()() % loads_.size());
  return true;
}

void HopperUnits::FenceAsyncProxy(int thread) {
  for (Granule& granule : granules_) {
    if (granule.copied_by == thread) granule.copied_by = -1;
  }
}

void HopperUnits::MeetNamed(int thread, int id, int threads, Named kind) {
  Require(id >= 1 && id <= 15 && threads > 0 && threads % kWarpLanes == 0,
          "named barrier that does not exist");
  NamedBarrier& barrier = named_[id];
  if (barrier.present.empty()) barrier.threads = threads;
  Require(barrier.threads == threads, "named barrier with two numbers of threads");
  Require(barrier.present.insert(thread).second, "thread that comes twice to a named barrier");
  RaceCheck& races = block_.races();
  races.Release(&barrier, thread);
  if (static_cast<int>(barrier.present.size()) == threads) {
    barrier.present.clear();
    ++barrier.phase;
    races.CompletePhase(&barrier);
  } else if (kind == Named::kSync) {
    block_.Wait(thread, &barrier.phase);
  }
  if (kind == Named::kSync) races.Acquire(&barrier, thread);
}

void HopperUnits::SetRegisters(int thread, int registers) {
  Require(registers >= 24 && registers <= 256 && registers % 8 == 0,
          "register count out of 24 to 256 in eights");
  registers_[thread / kWarpLanes] = registers;
}

void HopperUnits::FenceMma(int thread) {
  block_.Exchange(thread, kFenceProducts, &thread, 0);
  warps_[thread / kWarpLanes].is_fenced = true;
}

template <typename Visit>
void HopperUnits::VisitOperands(int warp, const Product& product, const Visit& visit) {
  constexpr int kPieces[] = {0, 8};  // channels that begin a granule
  for (const int channel : kPieces) {
    for (int row = 0; row < 16; ++row) {
      visit(GranuleOf(OperandAddress(product.a, warp % 4 * 16 + row, channel)));
    }
    for (int row = 0; row < product.columns; ++row) {
      visit(GranuleOf(OperandAddress(product.b, row, channel)));
    }
  }
}

void HopperUnits::MmaAsync(int thread, float* d, uint64_t a, uint64_t b, int columns, bool adds,
                           DType type) {
  const int warp_index = thread / kWarpLanes;
  const int lane = thread % kWarpLanes;
  const Product product = {a, b, columns, adds, type};
  static_assert(sizeof(product) <= kSlotBytes);
  const std::byte* const slots = block_.Exchange(thread, kQueueProduct, &product, sizeof(product));
  Product of_warp;
  std::memcpy(&of_warp, slots, sizeof(of_warp));
  Require(of_warp == product, "lanes with different products");
  Warp& warp = warps_[warp_index];
  Require(warp.is_fenced, "product without a fence after the accumulators were touched");
  if (warp.d[lane] == nullptr) {
    warp.d[lane] = d;
    warp.before[lane].assign(d, d + columns / 2);
    std::fill(d, d + columns / 2, Poison());
  }
  Require(warp.d[lane] == d, "products into two accumulators at a time");
  if (lane != 0) return;
  std::vector<Product>& queued = queued_[thread / kGroupThreads];
  if (warp.num_queued == queued.size()) queued.push_back(product);
  Require(queued[warp.num_queued++] == product, "warps of a group with different products");
  warp.open.push_back(product);
  warp.is_committed = false;
  VisitOperands(warp_index, product, [&](size_t granule) {
    Require(granules_[granule].loads == 0, "operand that is still on its way");
    Require(granules_[granule].copied_by < 0, "operand that was copied and not fenced");
    ++granules_[granule].readers;
    block_.races().ReadBy(thread, block_.shared() + granule * kGranule, kGranule);
  });
}

void HopperUnits::CommitMma(int thread) {
  block_.Exchange(thread, kCommitProducts, &thread, 0);
  warps_[thread / kWarpLanes].is_committed = true;
}

float HopperUnits::Element(uint32_t address, DType type) const {
  uint16_t bits;
  std::memcpy(&bits, block_.shared() + (address - window_), sizeof(bits));
  return type == DType::kF16 ? HalfBitsToFloat(bits) : BfloatBitsToFloat(bits);
}

void HopperUnits::ReadOperands(int warp_index, Warp* warp) const {
  warp->operands.clear();
  for (const Product& product : warp->open) {
    const auto read = [&](uint64_t descriptor, int first_row, int rows) {
      for (int row = first_row; row < first_row + rows; ++row) {
        for (int k = 0; k < kProductDepth; ++k) {
          warp->operands.push_back(Element(OperandAddress(descriptor, row, k), product.type));
        }
      }
    };
    read(product.a, warp_index % 4 * kWarpProductRows, kWarpProductRows);
    read(product.b, 0, product.columns);
  }
}

void HopperUnits::WaitMma(int thread, float* d, int count) {
  const int warp_index = thread / kWarpLanes;
  const int lane = thread % kWarpLanes;
  block_.Exchange(thread, kWaitProducts, &thread, 0);
  Warp& warp = warps_[warp_index];
  Require(warp.is_committed, "wait for products that are not committed");
  Require(warp.d[lane] == d && static_cast<int>(warp.before[lane].size()) == count,
          "wait for other accumulators");
  for (int i = 0; i < count; ++i) {
    Require(BitsOfFloat(d[i]) == BitsOfFloat(Poison()), "accumulator touched before the wait");
  }
  if (lane == 0 && warp_index % 4 == 0) {
    CountProducts(warp_index / 4, static_cast<int64_t>(warp.open.size()));
  }
  // By the first lane for all.
  if (warp.left_to_wait == 0) ReadOperands(warp_index, &warp);
  std::vector<float> sums = warp.before[lane];
  const float* operands = warp.operands.data();
  for (const Product& product : warp.open) {
    const float* const rows = operands;
    const float* const columns = operands + kProductDepth * kWarpProductRows;
    operands = columns + kProductDepth * product.columns;
    // Fragment of m64nNk16: element i of a lane.
    for (int r = 0; r < 2; ++r) {
      const float* const x = rows + kProductDepth * (lane / 4 + 8 * r);
      for (int c = 0; c < product.columns / 4; ++c) {
        const float* const y = columns + kProductDepth * (c / 2 * 8 + lane % 4 * 2 + c % 2);
        float sum = 0.0f;
        for (int k = 0; k < kProductDepth; ++k) sum += x[k] * y[k];
        float& to = sums[static_cast<size_t>(c / 2 * 4 + 2 * r + c % 2)];
        to = product.adds ? to + sum : sum;
      }
    }
  }
  std::copy(sums.begin(), sums.end(), d);
  warp.d[lane] = nullptr;
  // All lanes have read their operands.
  if (++warp.left_to_wait == kWarpLanes) {
    warp.left_to_wait = 0;
    for (const Product& product : warp.open) {
      VisitOperands(warp_index, product, [&](size_t granule) {
        --granules_[granule].readers;
        // They may be read until now.
        block_.races().ReadBy(warp_index * kWarpLanes, block_.shared() + granule * kGranule,
                              kGranule);
      });
    }
    warp.open.clear();
    warp.is_fenced = false;
  }
  block_.Exchange(thread, kWaitProducts, &thread, 0);
}

void HopperUnits::CheckEnd() const {
  Require(loads_.empty(), "loads left at the end of the block");
  for (const auto& [place, barrier] : barriers_) {
    Require(barrier.bytes == 0, "expected bytes left at the end of the block");
  }
  for (const auto& [id, barrier] : named_) {
    Require(barrier.present.empty(), "arrivals at a named barrier left at the end of the block");
  }
  for (const auto& [index, warp] : warps_) {
    Require(warp.open.empty(), "products left at the end of the block");
  }
  for (const auto& [group, queued] : queued_) {
    for (int warp = group * 4; warp < group * 4 + 4; ++warp) {
      const auto found = warps_.find(warp);
      Require(found != warps_.end() && found->second.num_queued == queued.size(),
              "warps of a group with different numbers of products");
    }
  }
  if (registers_.empty()) return;
  // Who neither gives nor takes has what the compiler may give each thread.
  const int num_warps = block_.num_threads() / kWarpLanes;
  int64_t registers = (num_warps - static_cast<int64_t>(registers_.size())) * kWarpLanes *
                      (kRegistersOfMultiprocessor / block_.num_threads() / 8 * 8);
  for (const auto& [warp, count] : registers_) {
    const auto next = registers_.find(warp ^ 1);
    Require(next != registers_.end() && next->second == count,
            "warps of a group with different registers");
    registers += int64_t{count} * kWarpLanes;
  }
  Require(registers <= kRegistersOfMultiprocessor, "more registers than a multiprocessor has");
}

}  // namespace keepset::kernels::cuda
