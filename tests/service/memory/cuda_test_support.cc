#include "tests/service/memory/cuda_test_support.h"

#include <dlfcn.h>

#include <cstddef>

namespace keepset::service {

int CallFake(const char* symbol) {
  void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
  return reinterpret_cast<int (*)()>(::dlsym(library, symbol))();
}
int DriverMappings() { return CallFake("fake_cuda_mappings"); }
int RetainedContexts(int device) {
  void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
  return reinterpret_cast<int (*)(int)>(::dlsym(library, "fake_cuda_retains"))(device);
}

RegionDescriptor IpcRegion(const fakes::DeviceExporter& exporter, uint64_t offset,
                           uint64_t length) {
  RegionDescriptor descriptor;
  descriptor.kind = "cuda_ipc";
  descriptor.ipc_handle = exporter.ipc_handle();
  descriptor.allocation_bytes = kDeviceBytes;
  descriptor.offset = offset;
  descriptor.length = length;
  descriptor.device_uuid = fakes::kFakeDeviceUuid;
  descriptor.generation = 1;
  return descriptor;
}

bool HoldsPattern(const MappedRegion& region, uint64_t offset) {
  for (int64_t i = 0; i < region.size_bytes(); ++i) {
    if (region.data()[i] != std::byte((offset + i) % 251)) return false;
  }
  return true;
}

}  // namespace keepset::service
