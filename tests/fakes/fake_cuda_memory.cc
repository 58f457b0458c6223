#include "tests/fakes/fake_cuda_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

namespace keepset::fake_cuda {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr uint64_t kInBlock = 64 << 10;

}  // namespace

std::string Blocks() {
  const char* const wanted = std::getenv("KEEPSET_FAKE_BLOCKS");
  return wanted == nullptr ? "" : wanted;
}

State& state() {
  static State instance;
  return instance;
}

std::vector<const PrimaryContext*>& current_contexts() {
  thread_local std::vector<const PrimaryContext*> contexts;
  return contexts;
}

Device CurrentDevice() {
  return current_contexts().empty() ? 0 : current_contexts().back()->device;
}

const std::pair<const uint64_t, Allocation>* Find(uint64_t pointer) {
  auto it = state().mapped.upper_bound(pointer);
  if (it == state().mapped.begin()) return nullptr;
  --it;
  return pointer < it->first + it->second.bytes ? &*it : nullptr;
}

void* MapShared(int fd, size_t bytes) {
  void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return data == MAP_FAILED ? nullptr : data;
}

uint64_t BlockBytes(uint64_t bytes) {
  return Blocks().empty() ? bytes : (bytes + kGranularity - 1) / kGranularity * kGranularity;
}

uint64_t PlaceInBlock(uint64_t bytes) {
  return Blocks().empty() || bytes > kGranularity - kInBlock ? 0 : kInBlock;
}

void* MapAtGranule(int fd, size_t bytes) {
  void* const room =
      ::mmap(nullptr, bytes + 2 * kGranularity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return nullptr;
  const uint64_t begin = reinterpret_cast<uint64_t>(room);
  const uint64_t end = begin + bytes + 2 * kGranularity;
  uint64_t base = (begin + kGranularity - 1) / kGranularity * kGranularity;
  if (std::getenv("KEEPSET_FAKE_SHARED_BLOCK") != nullptr) base += kGranularity / 2;
  ::munmap(room, base - begin);
  const uint64_t after = base + (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  ::munmap(reinterpret_cast<void*>(after), end - after);
  void* const data = ::mmap(reinterpret_cast<void*>(base), bytes, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_FIXED, fd, 0);
  return data == MAP_FAILED ? nullptr : data;
}

Result Wanted(const char* variable) {
  const char* const error = std::getenv(variable);
  return error == nullptr ? kSuccess : std::atoi(error);
}

int NewMemory(size_t bytes) {
  const std::string name = kMemoryName + std::to_string(CurrentDevice());
  const int fd = ::memfd_create(name.c_str(), MFD_CLOEXEC);
  if (fd >= 0 && ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    ::close(fd);
    return -1;
  }
  // As on a device, where it holds what its last user left.
  if (std::getenv("KEEPSET_FAKE_DIRTY_MEMORY") != nullptr) {
    const std::vector<unsigned char> dirt(kGranularity, 0xa5);
    for (size_t at = 0; fd >= 0 && at < bytes; at += dirt.size()) {
      if (::pwrite(fd, dirt.data(), std::min(dirt.size(), bytes - at), static_cast<off_t>(at)) <
          0) {
        break;
      }
    }
  }
  return fd;
}

void FinishUploads() {
  for (const Upload& upload : state().uploads) {
    std::memcpy(reinterpret_cast<void*>(upload.to), upload.bytes.data(), upload.bytes.size());
  }
  state().uploads.clear();
}

std::optional<Device> DeviceOf(int fd) {
  std::error_code error;
  const std::string target =
      std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd), error).string();
  const size_t at = target.find(kMemoryName);
  if (error || at == std::string::npos) return std::nullopt;
  return std::atoi(target.c_str() + at + sizeof(kMemoryName) - 1);
}

}  // namespace keepset::fake_cuda
