// Memory of the fake driver (fake_libcuda.cc), of which its entry points are made.
#ifndef KEEPSET_TESTS_FAKES_FAKE_CUDA_MEMORY_H_
#define KEEPSET_TESTS_FAKES_FAKE_CUDA_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/cuda_abi.h"

namespace keepset::fake_cuda {

using namespace cuda_abi;

inline constexpr size_t kGranularity = 2 << 20;
inline constexpr size_t kDeviceBytes = size_t{64} << 30;
inline constexpr int kNumDevices = 2;
inline constexpr char kMemoryName[] = "fake device memory ";

struct RawHandle {
  int64_t process = 0;
  int32_t fd = -1;
  uint32_t serial = 0;
  uint64_t bytes = 0;
  uint64_t inode = 0;
  uint64_t block_bytes = 0;
  uint64_t in_block = 0;  // where the allocation begins
};
static_assert(sizeof(RawHandle) <= sizeof(IpcHandle));

enum class Kind { kPlain, kVmm, kImported };
struct Allocation {
  Kind kind = Kind::kPlain;
  Device device = 0;
  int fd = -1;
  uint64_t bytes = 0;
  uint32_t serial = 0;
  RawHandle from;               // kImported
  AllocationHandle handle = 0;  // kVmm
  uint64_t block_bytes = 0;     // kPlain, kImported: what is mapped
  uint64_t in_block = 0;        // kPlain: where it begins; kImported: where its pointer is
};

struct PrimaryContext {
  Device device = 0;
  int retains = 0;
};

struct Upload {
  DevicePointer to = 0;
  std::vector<unsigned char> bytes;
};

struct State {
  std::mutex mutex;
  std::vector<Upload> uploads;              // staged
  std::map<uint64_t, Allocation> mapped;    // by base address
  std::map<AllocationHandle, int> handles;  // VMM: descriptor
  std::set<AllocationHandle> unshareable;   // VMM: made without a kind of shareable handle
  uint32_t next_serial = 1;
  int granularity_questions = 0;
  AllocationHandle next_handle = 1;
  PrimaryContext contexts[kNumDevices] = {{0}, {1}};
};

State& state();
// Contexts current on this thread, the last one on top.
std::vector<const PrimaryContext*>& current_contexts();
// Where memory is allocated: on the first device unless a context is current.
Device CurrentDevice();
// What is mapped at `pointer`, or null. The caller holds the mutex.
const std::pair<const uint64_t, Allocation>* Find(uint64_t pointer);
// Null on an error.
void* MapShared(int fd, size_t bytes);
// How plain allocations lie in blocks; empty: each is a block of its size.
std::string Blocks();
// Of an allocation of so many bytes.
uint64_t BlockBytes(uint64_t bytes);
uint64_t PlaceInBlock(uint64_t bytes);
// Where plain allocations of whole granules lie: at a multiple of one, unless a test wants another
// place.
void* MapAtGranule(int fd, size_t bytes);
// What a test lets fail: the driver's error in that variable of the environment; else success.
Result Wanted(const char* variable);
// A descriptor of memory of the current device; -1 on an error.
int NewMemory(size_t bytes);
// Before memory is read, and before any of it goes away. The caller holds the mutex.
void FinishUploads();
// The device of a descriptor of NewMemory; none for another.
std::optional<Device> DeviceOf(int fd);

}  // namespace keepset::fake_cuda

#endif  // KEEPSET_TESTS_FAKES_FAKE_CUDA_MEMORY_H_
