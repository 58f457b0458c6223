// Runs the kernels of kernels/cuda on the host, thread by thread, so that their index arithmetic,
// barriers and collectives are tested without a device. Every thread of a block is a fiber;
// barriers and warp collectives are where fibers change. Stricter than a device:
//  - a collective without all lanes of the warp, or a barrier without all threads, ends the
//  program;
//  - shared memory begins as NaN and is followed by an inaccessible page;
//  - an asynchronous copy arrives at once, or only when its group is waited for, by chance;
//  - the order of threads between two meeting points is shuffled, warps sleep for a while, and a
//  thread may be the last to go on wherever it can be.
// What is not emulated: rounding of tensor cores and of ex2.approx, and timing.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_SIMT_EMULATOR_H_
#define KEEPSET_TESTS_KERNELS_CUDA_SIMT_EMULATOR_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "kernels/cuda/element.h"
#include "kernels/cuda/launch.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

class EmulatedBlock;
class HopperUnits;

class EmulatedThread {
 public:
  EmulatedThread(EmulatedBlock* block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int num_threads() const;
  int lane() const { return thread_ & 31; }
  int warp() const { return thread_ >> 5; }
  int num_warps() const { return num_threads() >> 5; }
  int block_x() const;
  int block_y() const;
  int block_z() const;
  int grid_x() const;
  int grid_y() const;

  std::byte* shared() const;
  void SyncBlock() const;
  void SyncWarp() const;

  template <typename T>
  T ShuffleXor(T value, int mask) const {
    return ShuffleFrom(value, lane() ^ mask);
  }
  template <typename T>
  T ShuffleFrom(T value, int lane) const {
    static_assert(sizeof(T) <= kSlotBytes);
    T result;
    std::memcpy(&result, Exchange(kShuffle, &value, sizeof(T)) + lane * kSlotBytes, sizeof(T));
    return result;
  }
  uint32_t Ballot(bool vote) const;
  uint32_t MatchAny(uint32_t value) const;

  void CopyAsync16(std::byte* to, const std::byte* from, bool valid) const;
  void CommitCopies() const;
  template <int kNewest>
  void WaitCopies() const {
    WaitCopies(kNewest);
  }

  void LoadMatrix4(uint32_t* out, const std::byte* row) const;
  template <DType kType>
  void Mma(float& c0, float& c1, float& c2, float& c3, const uint32_t* a, uint32_t b0,
           uint32_t b1) const {
    float c[4] = {c0, c1, c2, c3};
    Multiply(c, a, b0, b1, kType);
    c0 = c[0];
    c1 = c[1];
    c2 = c[2];
    c3 = c[3];
  }

  template <typename T>
  T LoadOnce(const T* from) const {
    return *from;
  }
  template <typename T>
  void StoreGlobal(T* to, const T& value) const {
    *to = value;
  }
  float Exp2(float x) const { return std::exp2(x); }
  float Log2(float x) const { return std::log2(x); }
  double Log(double x) const { return std::log(x); }
  float Max(float a, float b) const { return std::fmax(a, b); }
  float Sqrt(float x) const { return std::sqrt(x); }
  double Sqrt(double x) const { return std::sqrt(x); }
  float Mul(float a, float b) const { return a * b; }
  float Add(float a, float b) const { return a + b; }
  float Div(float a, float b) const { return a / b; }
  double Mul(double a, double b) const { return a * b; }
  double Add(double a, double b) const { return a + b; }
  double Div(double a, double b) const { return a / b; }

  void AddShared(uint32_t* to, uint32_t value) const;
  void MinShared(uint32_t* to, uint32_t value) const;
  void MinGlobal(uint64_t* to, uint64_t value) const;

 protected:
  HopperUnits& hopper() const;

 private:
  static constexpr size_t kSlotBytes = 32;
  enum Collective { kShuffle, kBallot, kMatch, kSyncWarp, kLoadMatrix, kMultiply };
  friend class EmulatedBlock;

  // Meets the other lanes; returns what each of them brought, kSlotBytes apart.
  const std::byte* Exchange(Collective collective, const void* data, size_t bytes) const;
  void WaitCopies(int newest) const;
  void Multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, DType type) const;

  EmulatedBlock* block_;
  int thread_;
};

// Calls body once for every thread of every block. Blocks run one after the other, in an order that
// the seed shuffles.
void EmulateGrid(const LaunchShape& shape,
                 const std::function<void(const EmulatedThread& thread)>& body);

// For the launches that follow in this process, each of which has an order of its own.
void SetEmulationSeed(uint32_t seed);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_SIMT_EMULATOR_H_
