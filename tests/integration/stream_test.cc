#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;

void SendAll(WorkerStream& stream, uint64_t id, const v1::CompressRequest& request) {
  stream.Begin(id, request.spec());
  for (const v1::LayerInput& layer : request.layers()) stream.Layer(id, layer);
  stream.End(id);
}

// The next message, which must be an error of operation `id`.
v1::OperationError NextError(WorkerStream& stream, uint64_t id) {
  const std::optional<v1::StreamResponse> response = stream.NextAnswer();
  EXPECT_TRUE(response.has_value() && response->has_error());
  if (!response.has_value()) return {};
  EXPECT_EQ(response->operation_id(), id);
  return response->error();
}

TEST(CompressStream, GivesTheAnswerOfTheUnaryCall) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  request.mutable_spec()->set_gather(v1::GATHER_INLINE);
  v1::OperationResult unary;
  ASSERT_TRUE(Compress(server, request, &unary).ok());
  WorkerStream stream(server);
  SendAll(stream, 7, request);
  const std::optional<v1::StreamResponse> response = stream.NextAnswer();
  ASSERT_TRUE(response.has_value() && response->has_result());
  EXPECT_EQ(response->operation_id(), 7);
  ASSERT_EQ(response->result().layers_size(), unary.layers_size());
  for (int l = 0; l < unary.layers_size(); ++l) {
    EXPECT_EQ(response->result().layers(l).SerializeAsString(),
              unary.layers(l).SerializeAsString());
  }
  EXPECT_TRUE(stream.Finish().ok());
}

TEST(CompressStream, LayerLocalPolicyAnswersEachLayerEarly) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  const std::optional<v1::StreamResponse> early = stream.Next();
  ASSERT_TRUE(early.has_value() && early->has_layer());
  stream.Layer(1, request.layers(1));
  stream.Layer(1, request.layers(2));
  stream.End(1);
  ASSERT_TRUE(stream.Next()->has_layer());
  ASSERT_TRUE(stream.Next()->has_layer());
  const std::optional<v1::StreamResponse> last = stream.Next();
  ASSERT_TRUE(last.has_value() && last->has_result());
  EXPECT_EQ(early->layer().SerializeAsString(), last->result().layers(0).SerializeAsString());
}

TEST(CompressStream, InterleavedOperationsGetTheirOwnAnswers) {
  TestServer server;
  const fakes::SyntheticPrompt first({.seed = 1});
  const fakes::SyntheticPrompt second({.seed = 2});
  const v1::CompressRequest requests[] = {WireRequest(first, "tova", kBudget),
                                          WireRequest(second, "tova", kBudget)};
  WorkerStream stream(server);
  for (uint64_t id : {1, 2}) stream.Begin(id, requests[id - 1].spec());
  for (int l = 0; l < 3; ++l) {
    for (uint64_t id : {2, 1}) stream.Layer(id, requests[id - 1].layers(l));
  }
  for (uint64_t id : {1, 2}) stream.End(id);
  for (int i = 0; i < 2; ++i) {
    const std::optional<v1::StreamResponse> response = stream.NextAnswer();
    ASSERT_TRUE(response.has_value() && response->has_result());
    v1::OperationResult unary;
    ASSERT_TRUE(Compress(server, requests[response->operation_id() - 1], &unary).ok());
    for (int l = 0; l < 3; ++l) {
      EXPECT_EQ(response->result().layers(l).sets(0).indices(), unary.layers(l).sets(0).indices());
    }
  }
}

TEST(CompressStream, MissingLayersAreNamed) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  stream.End(1);
  const v1::OperationError error = NextError(stream, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(error.message(), HasSubstr("1..2"));
}

TEST(CompressStream, LayerOutOfOrderNamesTheOneExpected) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(1));
  const v1::OperationError error = NextError(stream, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(error.message(), HasSubstr("want layer 0"));
}

TEST(CompressStream, LayerSentTwiceIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  stream.Layer(1, request.layers(0));
  EXPECT_EQ(NextError(stream, 1).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
}

TEST(CompressStream, ErrorEndsItsOperationAndNotTheStream) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  v1::OperationSpec unknown = request.spec();
  unknown.set_policy("no_such_policy");
  WorkerStream stream(server);
  stream.Begin(1, unknown);
  // On its way before the error was seen: dropped, not answered again.
  stream.Layer(1, request.layers(0));
  stream.End(1);
  EXPECT_EQ(NextError(stream, 1).code(), static_cast<int>(absl::StatusCode::kNotFound));
  SendAll(stream, 2, request);
  const std::optional<v1::StreamResponse> response = stream.NextAnswer();
  ASSERT_TRUE(response.has_value() && response->has_result());
  EXPECT_EQ(response->operation_id(), 2);
}

TEST(CompressStream, IdOfAnEndedOperationMayBeUsedAgain) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  for (int i = 0; i < 2; ++i) {
    SendAll(stream, 1, request);
    ASSERT_TRUE(stream.NextAnswer()->has_result());
  }
}

TEST(CompressStream, UnknownOperationIdIsNotFound) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerStream stream(server);
  stream.Layer(9, WireLayer(prompt, 0));
  EXPECT_EQ(NextError(stream, 9).code(), static_cast<int>(absl::StatusCode::kNotFound));
}

TEST(CompressStream, OperationIdZeroIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerStream stream(server);
  stream.Begin(0, WireSpec(prompt, "tova", kBudget));
  EXPECT_EQ(NextError(stream, 0).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
}

TEST(CompressStream, SecondBeginEndsTheOpenOperation) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerStream stream(server);
  stream.Begin(1, WireSpec(prompt, "tova", kBudget));
  stream.Begin(1, WireSpec(prompt, "tova", kBudget));
  const v1::OperationError error = NextError(stream, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(error.message(), HasSubstr("open already"));
}

TEST(CompressStream, CancelIsIdempotentAndUnanswered) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  stream.Cancel(1);
  stream.Cancel(1);
  stream.Cancel(5);
  SendAll(stream, 2, request);
  const std::optional<v1::StreamResponse> response = stream.NextAnswer();
  ASSERT_TRUE(response.has_value() && response->has_result());
  EXPECT_EQ(response->operation_id(), 2);
  EXPECT_TRUE(server.log().AwaitLine({"operation", "outcome=cancelled"}));
}

TEST(CompressStream, CancelInTheMiddleOfALayerDropsTheOperation) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  server.gate().Close();
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  ASSERT_TRUE(server.gate().AwaitWaiting(1));
  stream.Cancel(1);
  // The reader has seen the cancel once it answers what came after it.
  stream.End(99);
  EXPECT_EQ(NextError(stream, 99).code(), static_cast<int>(absl::StatusCode::kNotFound));
  server.gate().Open();
  EXPECT_TRUE(Eventually([&] { return server.server().operations_running() == 0; }));
}

TEST(CompressStream, LayerWithoutCreditEndsItsOperation) {
  TestServer server("limits { stream_credits: 1 }");
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  server.gate().Close();
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  stream.Layer(1, request.layers(1));
  const v1::OperationError error = NextError(stream, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(error.message(), HasSubstr("credit"));
  server.gate().Open();
}

TEST(CompressStream, CreditComesBackAsLayersAreFinished) {
  TestServer server("limits { stream_credits: 1 }");
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  for (int l = 0; l < request.layers_size(); ++l) {
    ASSERT_TRUE(stream.AwaitCredit(l + 1));
    stream.Layer(1, request.layers(l));
  }
  ASSERT_TRUE(stream.AwaitCredit(request.layers_size() + 1));
  stream.End(1);
  const std::optional<v1::StreamResponse> response = stream.NextAnswer();
  EXPECT_TRUE(response.has_value() && response->has_result());
}

TEST(CompressStream, InlineLimitCoversAllLayersOfAnOperation) {
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  const size_t layer_bytes = request.layers(0).ByteSizeLong();
  TestServer server("limits { max_inline_bytes: " + std::to_string(2 * layer_bytes) + " }");
  WorkerStream stream(server);
  SendAll(stream, 1, request);
  const v1::OperationError error = NextError(stream, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(error.message(), HasSubstr("inline bytes"));
}

TEST(CompressStream, HalfCloseBeforeTheEndCancelsTheOperation) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  stream.Begin(1, request.spec());
  stream.Layer(1, request.layers(0));
  EXPECT_TRUE(stream.Finish().ok());
  EXPECT_TRUE(server.log().AwaitLine({"operation", "outcome=cancelled", "half-closed"}));
}

TEST(CompressStream, HalfCloseAfterTheEndStillBringsTheResult) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  WorkerStream stream(server);
  SendAll(stream, 1, request);
  EXPECT_TRUE(stream.Finish().ok());
  EXPECT_TRUE(server.log().AwaitLine({"operation", "outcome=compressed"}));
}

TEST(CompressStream, DeadClientFreesItsRegions) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), region);
  {
    WorkerStream stream(server);
    stream.Begin(1, request.spec());
    stream.Layer(1, request.layers(0));
    ASSERT_TRUE(Eventually([&] { return session.List().regions(0).leases() == 1; }));
    stream.Kill();
  }
  EXPECT_TRUE(Eventually([&] { return session.List().regions(0).leases() == 0; }));
  EXPECT_TRUE(Eventually([&] { return server.server().operations_running() == 0; }));
}

}  // namespace
}  // namespace keepset::integration
