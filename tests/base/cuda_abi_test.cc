#include "base/cuda_abi.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::cuda_abi {
namespace {

using ::testing::HasSubstr;

TEST(CudaAbi, MissingLibraryIsNotFound) {
  const absl::Status status = LoadImportApi("libkeepset-no-such-driver.so").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("libkeepset-no-such-driver.so"));
}

TEST(CudaAbi, LibraryWithoutTheEntryPointsIsNamedWithTheFirstOfThem) {
  const absl::Status status = LoadExportApi("libc.so.6").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("libc.so.6: no entry point cuInit"));
}

TEST(CudaAbi, ErrorsHaveTheDriversNameWhereItHasOne) {
  ExportApi api;
  api.error_name = [](Result error, const char** name) {
    *name = "CUDA_ERROR_INVALID_VALUE";
    return error == kInvalidValue ? kSuccess : kInvalidValue;
  };
  EXPECT_EQ(ErrorText(api, kInvalidValue), "CUDA_ERROR_INVALID_VALUE (1)");
  EXPECT_EQ(ErrorText(api, 7), "error 7");
}

TEST(CudaAbi, FaultsForksAndDestroyedContextsAreLost) {
  for (const Result result : {3, 4, 201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718,
                              719, 721, 810, 911}) {
    EXPECT_TRUE(IsLost(result)) << result;
  }
}

TEST(CudaAbi, RefusalsAreNotLost) {
  // 600 not ready, 701 too many registers, 900 to 906 of captures.
  for (const Result result : {kSuccess,
                              kInvalidValue,
                              kOutOfMemory,
                              kDeviceUnavailable,
                              kNoDevice,
                              kInvalidDevice,
                              kMapFailed,
                              kAlreadyMapped,
                              kPeerAccessUnsupported,
                              kOperatingSystem,
                              kInvalidHandle,
                              kNotFound,
                              600,
                              701,
                              kTooManyPeers,
                              kNotPermitted,
                              kNotSupported,
                              kMpsServerNotReady,
                              900,
                              901,
                              906,
                              kUnknown}) {
    EXPECT_FALSE(IsLost(result)) << result;
  }
}

TEST(CudaAbi, UuidsAreWrittenAsTheVendorsToolsDo) {
  EXPECT_EQ(UuidText({{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0, 1, 2, 3, 4, 5, 6, 0xff}}),
            "GPU-01234567-89ab-cdef-0001-0203040506ff");
}

}  // namespace
}  // namespace keepset::cuda_abi
