#include "tests/fakes/gated_backend.h"

#include <memory>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "kernels/backend_registry.h"

namespace keepset::kernels {
namespace {

// A backend of a device with more than one way to compute.
class VariedBackend : public fakes::GatedBackend {
 public:
  using GatedBackend::GatedBackend;
  std::string NameFor(const OpContext& /*context*/) const override { return "cuda/sm_90/wgmma"; }
  DeviceInfo Device() const override {
    DeviceInfo device;
    device.uuid = "GPU-1";
    return device;
  }
};

TEST(GatedBackend, NamesWhatTheInnerBackendDid) {
  fakes::Gate gate;
  fakes::GatedBackend backend(
      std::make_unique<VariedBackend>(*NewBackend("cpu", {.num_threads = 1}), gate), gate);
  const auto context = backend.NewContext();
  ASSERT_TRUE(context.ok()) << context.status();
  EXPECT_EQ(backend.NameFor(**context), "cuda/sm_90/wgmma");
  EXPECT_EQ(backend.Device().uuid, "GPU-1");
}

}  // namespace
}  // namespace keepset::kernels
