// How memory of a worker becomes readable here, and memory of ours there: one transport per kind of
// handle, listed in transports.def.
//
// A transport turns a descriptor into a mapping, or makes memory and its descriptor, and nothing
// else; sessions, quotas and leases are the SessionManager's. Transports are thread-safe and
// stateless unless they say otherwise.
#ifndef KEEPSET_SERVICE_MEMORY_MEMORY_TRANSPORT_H_
#define KEEPSET_SERVICE_MEMORY_MEMORY_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "service/memory/seen_generations.h"

namespace keepset::service {

// Owns one file descriptor.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.Release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) Reset(other.Release());
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { Reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd = -1);

 private:
  int fd_ = -1;
};

enum class RegionAccess { kReadOnly, kReadWrite };
enum class MemorySpace {
  kHost,
  kDevice,  // only a backend of that device may touch the bytes
};
// Of the memory behind a kind of region, known or not.
inline MemorySpace SpaceOf(absl::string_view kind) {
  return absl::StartsWith(kind, "cuda_") ? MemorySpace::kDevice : MemorySpace::kHost;
}

struct RegionDescriptor {
  std::string kind;        // "memfd"
  UniqueFd fd;             // descriptor transports
  std::string name;        // named transports
  std::string ipc_handle;  // "cuda_ipc": the bytes of the driver's handle
  uint64_t allocation_bytes = 0;
  uint64_t offset = 0;  // page-aligned in host memory
  uint64_t length = 0;
  std::string device_uuid;  // empty: host
  uint64_t generation = 0;
  // What the session's regions had mapped before; null: nothing.
  std::shared_ptr<SeenGenerations> seen_generations;
  RegionAccess access = RegionAccess::kReadOnly;
};

// RAII: unmaps at destruction. Immutable after creation; thread-safe.
class MappedRegion {
 public:
  virtual ~MappedRegion() = default;
  // Kind of the transport that mapped it; replies name it.
  virtual absl::string_view kind() const { return "region"; }
  virtual MemorySpace space() const { return MemorySpace::kHost; }
  virtual std::byte* data() const = 0;  // `length` bytes; writable only with kReadWrite
  virtual int64_t size_bytes() const = 0;
  virtual RegionAccess access() const = 0;
  // Called before an operation reads the region: the memory object still has its announced size.
  virtual absl::Status Verify() const = 0;
};

// Whether a transport takes memory of a device.
struct DeviceSupport {
  std::string uuid;
  std::string name;
  std::string obstacle;  // why not; mostly empty
};

// Memory of this process for one worker to map. Never used before, never pooled.
struct OwnedMemory {
  std::unique_ptr<MappedRegion> region;  // zeros, read-write; its end frees the memory
  UniqueFd fd;                           // descriptor transports: for the worker
  std::string ipc_handle;                // "cuda_ipc"
  uint64_t offset = 0;                   // of the region in what the worker maps
};

// What freeing memory of ours does to a worker that still has it mapped.
enum class EarlyFree {
  kHarmless,   // somebody counts the users: the memory lives until the last one has unmapped it
  kForbidden,  // undefined, or not known to be harmless
};

class MemoryTransport {
 public:
  virtual ~MemoryTransport() = default;

  virtual absl::string_view kind() const = 0;
  virtual bool needs_fd() const = 0;

  // Every device that the driver sees; none for memory of the host. Makes no context on any.
  virtual std::vector<DeviceSupport> DevicesSupported() { return {}; }

  // Device memory of others that open regions keep allocated: whole allocations, each once.
  virtual uint64_t DeviceBytes() const { return 0; }

  // InvalidArgument: sizes that overflow or exceed the object, offset not page-aligned, a memfd
  // that is not sealed against shrinking, not a memfd at all. Messages never tell names or
  // addresses of others.
  virtual absl::StatusOr<std::unique_ptr<MappedRegion>> Open(RegionDescriptor descriptor) = 0;

  // Bytes that a worker maps for `length` (at most 2^62) of Create.
  virtual uint64_t AllocationBytes(uint64_t length) const { return length; }
  virtual EarlyFree early_free() const { return EarlyFree::kForbidden; }
  // Fresh zeroed memory for a worker, AllocationBytes(length) of it. `device_uuid` empty: host
  // memory. InvalidArgument: no memory is made in this way, a device that does not belong to the
  // kind. FailedPrecondition: not a device of this host. ResourceExhausted: no memory left.
  virtual absl::StatusOr<OwnedMemory> Create(uint64_t length, const std::string& device_uuid);
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_MEMORY_TRANSPORT_H_
