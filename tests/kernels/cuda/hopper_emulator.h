// What Hopper's instructions do, emulated for a block of fibers: mbarriers, named barriers, loads
// by tensor map and wgmma. Written from the PTX manual alone, and stricter than a device:
//  - loads arrive box by box, late and in any order; until then their place may not be read;
//  - products are formed when they are waited for; accumulators are NaN before, and whoever changes
//    them, or overwrites an operand, ends the program;
//  - rows that were copied into shared memory need the fence of the async proxy before wgmma;
//  - descriptors are decoded bit by bit, tiles are swizzled by their addresses;
//  - arrivals too many, barriers that are not set up, threads that wait for ever, registers that
//    nobody has, and loads or arrivals left at the end of a block end the program, with a line that
//    says which.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_HOPPER_EMULATOR_H_
#define KEEPSET_TESTS_KERNELS_CUDA_HOPPER_EMULATOR_H_

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "kernels/views.h"
#include "tests/kernels/cuda/race_check.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels::cuda {

constexpr int kWarpLanes = 32;

// A tensor map of the emulated driver, in the bytes of a CUtensorMap.
struct EmulatedTensorMap {
  static constexpr uint32_t kMagic = 0x7e50a11u;
  uint32_t magic = kMagic;
  uint16_t rank = 0;
  uint16_t swizzle_bytes = 0;
  const std::byte* data = nullptr;
  uint64_t dims[4] = {};
  uint64_t stride_bytes[4] = {};  // [0] is of the element
  uint16_t box[4] = {};
};
static_assert(sizeof(EmulatedTensorMap) <= sizeof(CUtensorMap));

// What the units need of the block that they belong to.
class FiberBlock {
 public:
  virtual ~FiberBlock() = default;
  // Until *phase changes.
  virtual void Wait(int thread, const uint64_t* phase) = 0;
  // Meets the other lanes; returns what each of them brought, 32 bytes apart.
  virtual const std::byte* Exchange(int thread, int collective, const void* data, size_t bytes) = 0;
  virtual int num_threads() const = 0;
  virtual std::byte* shared() const = 0;
  virtual int64_t shared_bytes() const = 0;
  virtual std::mt19937& rng() = 0;
  virtual RaceCheck& races() = 0;
};

// Where element (row, channel) of an operand lies by its descriptor: an address of the shared
// window. Ends the program for a descriptor that has reserved bits.
uint32_t OperandAddress(uint64_t descriptor, int row, int channel);

class HopperUnits {
 public:
  explicit HopperUnits(FiberBlock* block);

  // Of the scheduler: some loads arrive by chance; one arrives (false when there is none); the
  // block has ended.
  void Advance();
  bool DeliverOne();
  void CheckEnd() const;
  // A thread copies 16 bytes into shared memory.
  void NoteCopy(int thread, const std::byte* to);

  uint32_t SharedAddress(const void* pointer) const;
  void InitBarrier(int thread, uint64_t* barrier, int arrivals);
  void FenceBarriers(int thread);
  void Arrive(int thread, uint64_t* barrier, int64_t expected_bytes);
  void WaitPhase(int thread, uint64_t* barrier, uint32_t parity);
  // Ends the program for a map that nobody encoded.
  static EmulatedTensorMap CheckMap(const CUtensorMap& map);
  void LoadBox(int thread, std::byte* to, const CUtensorMap& map, std::initializer_list<int> at,
               uint64_t* barrier);
  void FenceAsyncProxy(int thread);
  enum class Named { kSync, kArrive };
  void MeetNamed(int thread, int id, int threads, Named kind);
  void SetRegisters(int thread, int registers);

  void FenceMma(int thread);
  void MmaAsync(int thread, float* d, uint64_t a, uint64_t b, int columns, bool adds, DType type);
  void CommitMma(int thread);
  void WaitMma(int thread, float* d, int count);

 private:
  static constexpr int kGranule = 16;  // bytes of shared memory that are watched together

  struct Barrier {
    uint64_t* place = nullptr;
    int arrivals = 0;
    int pending = 0;
    int64_t bytes = 0;
    uint64_t phase = 0;
    int owner = 0;
    bool is_fenced = false;
  };
  struct Load {
    std::byte* to;
    EmulatedTensorMap map;
    std::vector<int> at;
    uint64_t* barrier;
  };
  struct NamedBarrier {
    int threads = 0;
    uint64_t phase = 0;
    std::set<int> present;
  };
  struct Granule {
    int loads = 0;       // on their way here
    int readers = 0;     // products that are not waited for
    int copied_by = -1;  // thread whose copy is not fenced yet
  };
  struct Product {
    uint64_t a;
    uint64_t b;
    int columns;
    bool adds;
    DType type;
    bool operator==(const Product&) const = default;
  };
  struct Warp {
    bool is_fenced = false;
    bool is_committed = true;
    std::vector<Product> open;
    // Of all of these, while they are waited for: rows of a, then of b, 16 channels each.
    std::vector<float> operands;
    size_t num_queued = 0;  // in all
    float* d[kWarpLanes] = {};
    std::vector<float> before[kWarpLanes];
    int left_to_wait = 0;
  };

  Barrier& Find(uint64_t* barrier);
  void Complete(Barrier* barrier);
  size_t GranuleOf(uint32_t address) const;
  float Element(uint32_t address, DType type) const;
  void ReadOperands(int warp_index, Warp* warp) const;
  // Calls visit(granule) for each granule that a warp's product reads.
  template <typename Visit>
  void VisitOperands(int warp, const Product& product, const Visit& visit);
  void Deliver(size_t index);

  FiberBlock& block_;
  const uint32_t window_;  // address of the block's first byte
  std::map<uint64_t*, Barrier> barriers_;
  std::vector<Load> loads_;
  std::map<int, NamedBarrier> named_;
  std::vector<Granule> granules_;
  std::map<int, Warp> warps_;
  std::map<int, std::vector<Product>> queued_;  // of each warp group, in order
  std::map<int, int> registers_;                // of each warp
};

// The machine of kernels/cuda/hopper_device.cuh.
class EmulatedHopperThread : public EmulatedThread {
 public:
  explicit EmulatedHopperThread(const EmulatedThread& thread) : EmulatedThread(thread) {}

  uint32_t SharedAddress(const void* pointer) const { return hopper().SharedAddress(pointer); }
  void InitBarrier(uint64_t* barrier, int arrivals) const {
    hopper().InitBarrier(thread(), barrier, arrivals);
  }
  void FenceBarriers() const { hopper().FenceBarriers(thread()); }
  void Arrive(uint64_t* barrier) const { hopper().Arrive(thread(), barrier, 0); }
  void ArriveAndExpect(uint64_t* barrier, int bytes) const {
    hopper().Arrive(thread(), barrier, bytes);
  }
  void WaitPhase(uint64_t* barrier, uint32_t parity) const {
    hopper().WaitPhase(thread(), barrier, parity);
  }
  void PrefetchMap(const CUtensorMap& map) const { hopper().CheckMap(map); }
  void LoadBox(std::byte* to, const CUtensorMap& map, int c0, int c1, int c2,
               uint64_t* barrier) const {
    hopper().LoadBox(thread(), to, map, {c0, c1, c2}, barrier);
  }
  void LoadBox(std::byte* to, const CUtensorMap& map, int c0, int c1, int c2, int c3,
               uint64_t* barrier) const {
    hopper().LoadBox(thread(), to, map, {c0, c1, c2, c3}, barrier);
  }
  void FenceAsyncProxy() const { hopper().FenceAsyncProxy(thread()); }
  void SyncNamed(int id, int threads) const {
    hopper().MeetNamed(thread(), id, threads, HopperUnits::Named::kSync);
  }
  void ArriveNamed(int id, int threads) const {
    hopper().MeetNamed(thread(), id, threads, HopperUnits::Named::kArrive);
  }
  template <int kRegisters>
  void ShrinkRegisters() const {
    hopper().SetRegisters(thread(), kRegisters);
  }
  template <int kRegisters>
  void GrowRegisters() const {
    hopper().SetRegisters(thread(), kRegisters);
  }
  template <int kCount>
  void FenceMma(float (&/*d*/)[kCount]) const {
    hopper().FenceMma(thread());
  }
  template <DType kType, int kColumns>
  void MmaAsync(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool adds) const {
    hopper().MmaAsync(thread(), d, a, b, kColumns, adds, kType);
  }
  void CommitMma() const { hopper().CommitMma(thread()); }
  template <int kCount>
  void WaitMma(float (&d)[kCount]) const {
    hopper().WaitMma(thread(), d, kCount);
  }
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_HOPPER_EMULATOR_H_
