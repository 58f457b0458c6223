// Another process that owns device memory of fake_libcuda, as an engine does.
#ifndef KEEPSET_TESTS_FAKES_DEVICE_EXPORTER_H_
#define KEEPSET_TESTS_FAKES_DEVICE_EXPORTER_H_

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace keepset::fakes {

inline constexpr char kFakeDeviceUuid[] = "GPU-00112233-4455-6677-8899-aabbccddeeff";
inline constexpr char kSecondFakeDeviceUuid[] = "GPU-ffeeddcc-bbaa-9988-7766-554433221100";

enum class DeviceMemory { kPlain, kVmm };

// Allocates `bytes` (kVmm: a multiple of 2 MiB) whose byte i is i % 251, on the device of this
// ordinal. The caller has no threads.
class DeviceExporter {
 public:
  DeviceExporter(const std::string& library, DeviceMemory memory, uint64_t bytes, int device = 0);
  ~DeviceExporter() { Kill(); }
  DeviceExporter(const DeviceExporter&) = delete;
  DeviceExporter& operator=(const DeviceExporter&) = delete;

  const std::string& ipc_handle() const { return ipc_handle_; }  // kPlain
  int OpenFd() const;                                            // kVmm; the caller's to close
  pid_t pid() const { return pid_; }
  void FreeMemory();  // kPlain
  void Kill();        // SIGKILL, as a crash

 private:
  pid_t pid_ = -1;
  int to_child_ = -1;
  int from_child_ = -1;
  int child_fd_ = -1;
  std::string ipc_handle_;
};

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_DEVICE_EXPORTER_H_
