// Device memory of another process over a driver of host memory (tests/fakes/fake_libcuda.cc).
#ifndef KEEPSET_TESTS_SERVICE_MEMORY_CUDA_TEST_SUPPORT_H_
#define KEEPSET_TESTS_SERVICE_MEMORY_CUDA_TEST_SUPPORT_H_

#include <cstdint>

#include "service/memory/memory_transport.h"
#include "tests/fakes/device_exporter.h"

namespace keepset::service {

// Of every exporter's allocation.
inline constexpr uint64_t kDeviceBytes = 2 << 20;

// An int() of the fake driver by its name.
int CallFake(const char* symbol);
// Mappings the driver holds in this process.
int DriverMappings();
// Primary contexts it holds there of the device of this ordinal.
int RetainedContexts(int device);

// Of the exporter's allocation, by cuda_ipc.
RegionDescriptor IpcRegion(const fakes::DeviceExporter& exporter, uint64_t offset, uint64_t length);

// Whether the region holds what the exporter wrote from `offset` on.
bool HoldsPattern(const MappedRegion& region, uint64_t offset);

}  // namespace keepset::service

#endif  // KEEPSET_TESTS_SERVICE_MEMORY_CUDA_TEST_SUPPORT_H_
