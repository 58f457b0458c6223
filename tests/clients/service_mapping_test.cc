// Mapping a server's memory, over a driver of host memory (tests/fakes/fake_libcuda.cc).
#include "clients/cpp/service_mapping.h"

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/fakes/device_exporter.h"

namespace keepset::client {
namespace {

using fakes::DeviceExporter;
using fakes::DeviceMemory;
using ::testing::HasSubstr;

constexpr uint64_t kBytes = 2 << 20;

int CallFake(const char* symbol) {
  void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
  return reinterpret_cast<int (*)()>(::dlsym(library, symbol))();
}

int Mappings() { return CallFake("fake_cuda_mappings"); }

MappingSource Source(const std::string& kind) {
  MappingSource source;
  source.kind = kind;
  source.allocation_bytes = kBytes;
  source.device_uuid = fakes::kFakeDeviceUuid;
  source.library = KEEPSET_FAKE_LIBCUDA;
  return source;
}

void ExpectPatternAndWrite(ServiceMapping& mapping) {
  for (uint64_t i = 0; i < kBytes; i += 997) {
    ASSERT_EQ(mapping.data()[i], static_cast<std::byte>(i % 251)) << i;
  }
  mapping.data()[kBytes - 1] = std::byte{1};
}

TEST(ServiceMapping, DeviceMemoryByIpcIsMappedUntilItsEnd) {
  const int before = Mappings();
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  MappingSource source = Source("cuda_ipc");
  source.ipc_handle = exporter.ipc_handle();
  {
    const auto mapping = ServiceMapping::Open(source);
    ASSERT_TRUE(mapping.ok()) << mapping.status();
    ExpectPatternAndWrite(**mapping);
    EXPECT_EQ(Mappings(), before + 1);
  }
  EXPECT_EQ(Mappings(), before);
  EXPECT_EQ(CallFake("fake_cuda_context_depth"), 0);
}

TEST(ServiceMapping, DeviceMemoryByDescriptorIsMappedUntilItsEnd) {
  const int before = Mappings();
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kVmm, kBytes);
  MappingSource source = Source("cuda_vmm");
  source.fd = exporter.OpenFd();
  {
    const auto mapping = ServiceMapping::Open(source);
    ASSERT_TRUE(mapping.ok()) << mapping.status();
    ExpectPatternAndWrite(**mapping);
  }
  ::close(source.fd);
  EXPECT_EQ(Mappings(), before);
  EXPECT_EQ(CallFake("fake_cuda_context_depth"), 0);
}

TEST(ServiceMapping, AnUnmappingThatTheDriverRefusesIsAnError) {
  const DeviceExporter exporter(KEEPSET_FAKE_LIBCUDA, DeviceMemory::kPlain, kBytes);
  MappingSource source = Source("cuda_ipc");
  source.ipc_handle = exporter.ipc_handle();
  const auto mapping = ServiceMapping::Open(source);
  ASSERT_TRUE(mapping.ok()) << mapping.status();
  void* const library = ::dlopen(KEEPSET_FAKE_LIBCUDA, RTLD_NOW);
  const auto close_handle =
      reinterpret_cast<int (*)(uint64_t)>(::dlsym(library, "cuIpcCloseMemHandle"));
  ASSERT_EQ(close_handle(reinterpret_cast<uint64_t>((*mapping)->data())), 0);
  const absl::Status status = (*mapping)->Unmap();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("cuIpcCloseMemHandle"));
}

TEST(ServiceMapping, ADescriptorOfSomethingElseIsRefusedAndLeavesNothing) {
  const int before = Mappings();
  MappingSource source = Source("cuda_vmm");
  source.fd = ::memfd_create("something else", MFD_CLOEXEC);
  EXPECT_FALSE(ServiceMapping::Open(source).ok());
  ::close(source.fd);
  EXPECT_EQ(Mappings(), before);
}

TEST(ServiceMapping, ADeviceThatThisProcessDoesNotSeeNamesWhatToChange) {
  MappingSource source = Source("cuda_ipc");
  source.device_uuid = "GPU-0";
  const absl::Status status = ServiceMapping::Open(source).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("CUDA_VISIBLE_DEVICES"));
}

TEST(ServiceMapping, AHostWithoutADriverSaysSo) {
  MappingSource source = Source("cuda_ipc");
  source.library = "/nowhere/libcuda.so.1";
  EXPECT_EQ(ServiceMapping::Open(source).status().code(), absl::StatusCode::kNotFound);
}

TEST(ServiceMapping, AnUnknownKindIsRefused) {
  EXPECT_EQ(ServiceMapping::Open(Source("tape")).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace keepset::client
