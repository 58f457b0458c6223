#include "service/rpc/wire_status.h"

#include <gtest/gtest.h>

#include <string>

namespace keepset::service {
namespace {

TEST(PublicStatus, HidesTheTextOfOurOwnFaults) {
  for (const absl::Status& fault :
       {absl::InternalError("/etc/secret"), absl::UnknownError("/etc/secret"),
        absl::DataLossError("/etc/secret")}) {
    const absl::Status seen = PublicStatus(fault, "00ff");
    EXPECT_EQ(seen.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(seen.message(), "internal error, correlation id 00ff");
  }
}

TEST(PublicStatus, KeepsWhatTheCallerCanMend) {
  const absl::Status status = absl::InvalidArgumentError("seq_len=0, want 1..8");
  EXPECT_EQ(PublicStatus(status, "00ff"), status);
}

TEST(PublicStatus, CutsNoCharacter) {
  const std::string text(2047, 'a');
  EXPECT_EQ(PublicStatus(absl::NotFoundError(text + "é"), "00ff").message(), text + "...");
}

TEST(PublicStatus, EscapesBytesThatAreNoText) {
  EXPECT_EQ(PublicStatus(absl::NotFoundError("x\xff.safetensors"), "00ff").message(),
            "x\\xff.safetensors");
}

TEST(ToGrpcStatus, KeepsCodeAndMessage) {
  const grpc::Status status = ToGrpcStatus(absl::AbortedError("stale"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(status.error_message(), "stale");
}

}  // namespace
}  // namespace keepset::service
