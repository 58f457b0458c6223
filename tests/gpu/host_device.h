// A device of host memory: the CPU backend under the name of a device, so that a server over it
// takes the "device memory" of tests/fakes/fake_libcuda.cc.
#ifndef KEEPSET_TESTS_GPU_HOST_DEVICE_H_
#define KEEPSET_TESTS_GPU_HOST_DEVICE_H_

#include <string>

#include "kernels/compute_backend.h"
#include "tests/fakes/device_exporter.h"
#include "tests/fakes/gated_backend.h"

namespace keepset::gpu {

class HostDevice : public fakes::GatedBackend {
 public:
  using GatedBackend::GatedBackend;
  std::string name() const override { return "cuda/host"; }
  kernels::DeviceInfo Device() const override {
    kernels::DeviceInfo device;
    device.uuid = fakes::kFakeDeviceUuid;
    device.name = "host";
    device.driver_version = "0.0";
    return device;
  }
};

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_HOST_DEVICE_H_
