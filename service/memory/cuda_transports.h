// The transports of device memory over a given driver; the ones of transports.def load libcuda when
// the first region arrives, so a host without a driver pays nothing and learns why.
#ifndef KEEPSET_SERVICE_MEMORY_CUDA_TRANSPORTS_H_
#define KEEPSET_SERVICE_MEMORY_CUDA_TRANSPORTS_H_

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "service/memory/cuda_driver.h"
#include "service/memory/memory_transport.h"

namespace keepset::service {

// Called once per region until it succeeds; thread-safe.
using CudaDriverSource = std::function<absl::StatusOr<std::shared_ptr<CudaDriver>>()>;

// A source that loads `library` once and answers the same driver from then on.
CudaDriverSource LoadOnce(const std::string& library);

// "cuda_ipc": RegionDescriptor.ipc_handle, allocation_bytes as the driver states it.
std::unique_ptr<MemoryTransport> NewCudaIpcTransport(CudaDriverSource driver);
// "cuda_vmm": a POSIX descriptor of a VMM allocation, passed over the side socket.
std::unique_ptr<MemoryTransport> NewCudaVmmTransport(CudaDriverSource driver);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_CUDA_TRANSPORTS_H_
