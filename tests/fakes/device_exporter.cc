#include "tests/fakes/device_exporter.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "base/cuda_abi.h"

namespace keepset::fakes {
namespace {

using cuda_abi::AllocationHandle;
using cuda_abi::DevicePointer;
using cuda_abi::Result;

struct Announcement {
  cuda_abi::IpcHandle handle = {};
  int fd = -1;
  bool ok = false;
};

template <typename Function>
Function Entry(void* library, const char* symbol) {
  return reinterpret_cast<Function>(::dlsym(library, symbol));
}

void Fill(DevicePointer pointer, uint64_t bytes) {
  auto* const data = reinterpret_cast<unsigned char*>(pointer);
  for (uint64_t i = 0; i < bytes; ++i) data[i] = static_cast<unsigned char>(i % 251);
}

Announcement MakePlain(void* library, uint64_t bytes, DevicePointer* pointer) {
  Announcement out;
  out.ok = Entry<Result (*)(DevicePointer*, size_t)>(library, "cuMemAlloc_v2")(pointer, bytes) ==
               cuda_abi::kSuccess &&
           Entry<Result (*)(cuda_abi::IpcHandle*, DevicePointer)>(library, "cuIpcGetMemHandle")(
               &out.handle, *pointer) == cuda_abi::kSuccess;
  if (out.ok) Fill(*pointer, bytes);
  return out;
}

Announcement MakeVmm(void* library, uint64_t bytes) {
  Announcement out;
  AllocationHandle handle = 0;
  DevicePointer pointer = 0;
  const cuda_abi::AccessDescriptor access = {{cuda_abi::kLocationTypeDevice, 0},
                                             cuda_abi::kAccessReadWrite};
  using Create = Result (*)(AllocationHandle*, size_t, const void*, unsigned long long);
  using Reserve = Result (*)(DevicePointer*, size_t, size_t, DevicePointer, unsigned long long);
  using Map = Result (*)(DevicePointer, size_t, size_t, AllocationHandle, unsigned long long);
  using SetAccess = Result (*)(DevicePointer, size_t, const cuda_abi::AccessDescriptor*, size_t);
  using Export = Result (*)(void*, AllocationHandle, int, unsigned long long);
  out.ok = Entry<Create>(library, "cuMemCreate")(&handle, bytes, nullptr, 0) == 0 &&
           Entry<Reserve>(library, "cuMemAddressReserve")(&pointer, bytes, 0, 0, 0) == 0 &&
           Entry<Map>(library, "cuMemMap")(pointer, bytes, 0, handle, 0) == 0 &&
           Entry<SetAccess>(library, "cuMemSetAccess")(pointer, bytes, &access, 1) == 0 &&
           Entry<Export>(library, "cuMemExportToShareableHandle")(
               &out.fd, handle, cuda_abi::kHandleTypePosixFd, 0) == 0;
  if (out.ok) Fill(pointer, bytes);
  return out;
}

[[noreturn]] void RunExporter(const std::string& path, DeviceMemory memory, uint64_t bytes,
                              int device, int in, int out) {
  void* const library = ::dlopen(path.c_str(), RTLD_NOW);
  DevicePointer pointer = 0;
  Announcement announcement;
  cuda_abi::Context context = nullptr;
  if (library != nullptr &&
      Entry<Result (*)(cuda_abi::Context*, int)>(library, "cuDevicePrimaryCtxRetain")(
          &context, device) == cuda_abi::kSuccess &&
      Entry<Result (*)(cuda_abi::Context)>(library, "cuCtxPushCurrent_v2")(context) ==
          cuda_abi::kSuccess) {
    announcement = memory == DeviceMemory::kPlain ? MakePlain(library, bytes, &pointer)
                                                  : MakeVmm(library, bytes);
  }
  if (::write(out, &announcement, sizeof(announcement)) < 0) ::_exit(1);
  char command = 0;
  while (::read(in, &command, 1) == 1) {
    static_cast<void>(Entry<Result (*)(DevicePointer)>(library, "cuMemFree_v2")(pointer));
    if (::write(out, &command, 1) < 0) break;
  }
  ::_exit(0);
}

}  // namespace

DeviceExporter::DeviceExporter(const std::string& library, DeviceMemory memory, uint64_t bytes,
                               int device) {
  int down[2];
  int up[2];
  if (::pipe2(down, O_CLOEXEC) != 0 || ::pipe2(up, O_CLOEXEC) != 0) {
    ADD_FAILURE() << "pipe";
    return;
  }
  pid_ = ::fork();
  if (pid_ == 0) {
    ::close(down[1]);
    ::close(up[0]);
    RunExporter(library, memory, bytes, device, down[0], up[1]);
  }
  ::close(down[0]);
  ::close(up[1]);
  to_child_ = down[1];
  from_child_ = up[0];
  Announcement announcement;
  EXPECT_EQ(::read(from_child_, &announcement, sizeof(announcement)),
            static_cast<ssize_t>(sizeof(announcement)));
  EXPECT_TRUE(announcement.ok);
  ipc_handle_.assign(reinterpret_cast<const char*>(announcement.handle.reserved),
                     sizeof(announcement.handle.reserved));
  child_fd_ = announcement.fd;
}

int DeviceExporter::OpenFd() const {
  return ::open(absl::StrCat("/proc/", pid_, "/fd/", child_fd_).c_str(), O_RDWR | O_CLOEXEC);
}

void DeviceExporter::FreeMemory() {
  char command = 'f';
  EXPECT_EQ(::write(to_child_, &command, 1), 1);
  EXPECT_EQ(::read(from_child_, &command, 1), 1);
}

void DeviceExporter::Kill() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
  ::close(to_child_);
  ::close(from_child_);
}

}  // namespace keepset::fakes
