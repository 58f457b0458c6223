// Memory that a server made for this client and that both have mapped.
#ifndef KEEPSET_CLIENTS_CPP_SERVICE_REGION_H_
#define KEEPSET_CLIENTS_CPP_SERVICE_REGION_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "clients/cpp/device_memory.h"

namespace keepset::client {

class ServiceMapping;

// What to ask of a server.
struct ServiceMemory {
  std::string kind = "memfd";  // or "cuda_ipc", "cuda_vmm"
  int64_t size_bytes = 0;
  std::string device_uuid;         // of the cuda kinds, one of ServerInfo's devices
  std::string library = kLibcuda;  // the driver of the cuda kinds
};

// Made by Client::AllocateRegion, whose client must outlive it. The destructor retires it, ignoring
// the answer. Work on a device that uses the memory
// must have ended before. Thread-safe, except that nothing may use data() any more once Retire
// begins.
class ServiceRegion {
 public:
  // For Session. `forget` comes first when it is retired, `tell_server` once it is unmapped.
  ServiceRegion(std::string name, ServiceMemory memory, int64_t offset,
                std::unique_ptr<ServiceMapping> mapping, std::function<void()> forget,
                std::function<absl::Status()> tell_server);
  ~ServiceRegion();
  ServiceRegion(const ServiceRegion&) = delete;
  ServiceRegion& operator=(const ServiceRegion&) = delete;

  // Null once it is retired.
  std::byte* data() const;
  int64_t size_bytes() const { return memory_.size_bytes; }
  const std::string& kind() const { return memory_.kind; }
  const std::string& name() const { return name_; }
  bool Contains(const void* data, int64_t size_bytes) const;

  // OK while the server lets operations use it. FailedPrecondition: its session was opened again
  // (Client::Reopen), or it is retired. After a Reopen host memory can still be read; the server
  // may free device memory of the session before at any time, and a server that was restarted has
  // freed it: nothing may use that any more.
  absl::Status status() const;

  // For Session: from now on status() is that of a region of the session before.
  void NoteLost() const;

  // Unmaps the memory, then tells the server, in this order: the server frees it upon that word.
  // Answers what the server said, NotFound after its restart. Internal: the memory could not be
  // unmapped; data() is null all the same, and the server, which is not told, keeps the memory from
  // others until this process has ended, and that stays the answer. Called again after an error of
  // the server's or of the connection, it tells the server again. OK for one that is retired.
  absl::Status Retire();

 private:
  const std::string name_;
  const ServiceMemory memory_;
  const int64_t offset_;
  const std::function<void()> forget_;  // calls name it no longer
  const std::function<absl::Status()> tell_server_;
  absl::Mutex retire_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);  // held while the server is told
  absl::Status unmapped_ ABSL_GUARDED_BY(retire_mutex_);
  bool is_told_ ABSL_GUARDED_BY(retire_mutex_) = false;
  mutable absl::Mutex mutex_;
  std::unique_ptr<ServiceMapping> mapping_ ABSL_GUARDED_BY(mutex_);
  mutable absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_SERVICE_REGION_H_
