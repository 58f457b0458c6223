// Memory that runs out and requests that would make it: answered, and the server goes on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <new>
#include <stdexcept>
#include <string>

#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint64_t kBudget = 24;

void ExpectServes(TestServer& server) {
  const fakes::SyntheticPrompt prompt({});
  server.gate().Throw(nullptr);
  const grpc::Status status = Compress(server, WireRequest(prompt, "snapkv", kBudget), nullptr);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST(Exhaustion, AllocationThatFailsIsAnsweredOnAUnaryCall) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  server.gate().Throw([] { throw std::bad_alloc(); });
  const grpc::Status status = Compress(server, WireRequest(prompt, "snapkv", kBudget), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("memory"));
  ExpectServes(server);
}

TEST(Exhaustion, AllocationThatFailsIsAnsweredOnAStream) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  server.gate().Throw([] { throw std::bad_alloc(); });
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  const std::optional<v1::StreamResponse> response = stream.Next();
  ASSERT_TRUE(response.has_value() && response->has_error());
  EXPECT_EQ(response->error().code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
  ExpectServes(server);
}

// The device's memory is full of other operations.
TEST(Exhaustion, OperationThatTheBackendHasNoMemoryForKeepsEverything) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  server.gate().FailWith(absl::ResourceExhaustedError("cuda: no memory"));
  v1::OperationResult result;
  const grpc::Status status = Compress(server, WireRequest(prompt, "snapkv", kBudget), &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(result.outcome(), v1::OUTCOME_KEPT_FULL);
  EXPECT_EQ(result.reason(), v1::REASON_SHED);
  server.gate().FailWith(absl::OkStatus());
  ASSERT_TRUE(Compress(server, WireRequest(prompt, "snapkv", kBudget), &result).ok());
  EXPECT_EQ(result.outcome(), v1::OUTCOME_COMPRESSED);
}

TEST(Exhaustion, WhatALibraryThrowsIsOurFaultAndNotShown) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  server.gate().Throw([] { throw std::runtime_error("inside"); });
  const grpc::Status status = Compress(server, WireRequest(prompt, "snapkv", kBudget), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_THAT(status.error_message(), Not(HasSubstr("inside")));
  EXPECT_TRUE(server.log().AwaitLine({"error operation", "inside"}));
  ExpectServes(server);
}

TEST(Exhaustion, SmallRequestForGibibytesOfPositionsIsRefused) {
  TestServer server;
  v1::CompressRequest request;
  v1::OperationSpec* spec = request.mutable_spec();
  spec->mutable_model()->set_num_layers(1024);
  spec->mutable_model()->set_num_qo_heads(1);
  spec->mutable_model()->set_num_kv_heads(1);
  spec->mutable_model()->set_head_dim(64);
  spec->set_seq_len(1 << 20);
  spec->set_kv_dtype(v1::DTYPE_BF16);
  spec->set_policy("full");
  for (uint32_t layer = 0; layer < 1024; ++layer) request.add_layers()->set_layer(layer);
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("1024 keep sets of a prompt of 1048576"));
  ExpectServes(server);
}

}  // namespace
}  // namespace keepset::integration
