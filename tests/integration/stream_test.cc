#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;
// Of operations that a worker runs: the reader of the stream, which runs short ones, stays free.
constexpr int64_t kLongPrompt = 1024;

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

// A server with one stream open to it, and a prompt to send.
class CompressStream : public ::testing::Test {
 protected:
  TestServer server_;
  const fakes::SyntheticPrompt prompt_{{}};
  v1::CompressRequest request_ = WireRequest(prompt_, "tova", kBudget);
  WorkerStream stream_{server_};
};

TEST_F(CompressStream, GivesTheAnswerOfTheUnaryCall) {
  request_.mutable_spec()->set_gather(v1::GATHER_INLINE);
  v1::OperationResult unary;
  ASSERT_TRUE(Compress(server_, request_, &unary).ok());
  SendAll(stream_, 7, request_);
  const std::optional<v1::StreamResponse> response = stream_.NextAnswer();
  ASSERT_TRUE(response.has_value() && response->has_result());
  EXPECT_EQ(response->operation_id(), 7);
  ASSERT_EQ(response->result().layers_size(), unary.layers_size());
  for (int l = 0; l < unary.layers_size(); ++l) {
    EXPECT_EQ(response->result().layers(l).SerializeAsString(),
              unary.layers(l).SerializeAsString());
  }
  EXPECT_TRUE(stream_.Finish().ok());
}

TEST_F(CompressStream, LayerLocalPolicyAnswersEachLayerEarly) {
  const v1::CompressRequest request = WireRequest(prompt_, "snapkv", kBudget);
  stream_.Begin(1, request.spec());
  stream_.Layer(1, request.layers(0));
  const std::optional<v1::StreamResponse> early = stream_.Next();
  ASSERT_TRUE(early.has_value() && early->has_layer());
  stream_.Layer(1, request.layers(1));
  stream_.Layer(1, request.layers(2));
  stream_.End(1);
  ASSERT_TRUE(stream_.Next()->has_layer());
  ASSERT_TRUE(stream_.Next()->has_layer());
  const std::optional<v1::StreamResponse> last = stream_.Next();
  ASSERT_TRUE(last.has_value() && last->has_result());
  EXPECT_EQ(early->layer().SerializeAsString(), last->result().layers(0).SerializeAsString());
}

TEST_F(CompressStream, InterleavedOperationsGetTheirOwnAnswers) {
  const fakes::SyntheticPrompt first({.seed = 1});
  const fakes::SyntheticPrompt second({.seed = 2});
  const v1::CompressRequest requests[] = {WireRequest(first, "tova", kBudget),
                                          WireRequest(second, "tova", kBudget)};
  for (uint64_t id : {1, 2}) stream_.Begin(id, requests[id - 1].spec());
  for (int l = 0; l < 3; ++l) {
    for (uint64_t id : {2, 1}) stream_.Layer(id, requests[id - 1].layers(l));
  }
  for (uint64_t id : {1, 2}) stream_.End(id);
  for (int i = 0; i < 2; ++i) {
    const std::optional<v1::StreamResponse> response = stream_.NextAnswer();
    ASSERT_TRUE(response.has_value() && response->has_result());
    v1::OperationResult unary;
    ASSERT_TRUE(Compress(server_, requests[response->operation_id() - 1], &unary).ok());
    for (int l = 0; l < 3; ++l) {
      EXPECT_EQ(response->result().layers(l).sets(0).indices(), unary.layers(l).sets(0).indices());
    }
  }
}

TEST_F(CompressStream, MissingLayersAreNamed) {
  stream_.Begin(1, request_.spec());
  stream_.Layer(1, request_.layers(0));
  stream_.End(1);
  const v1::OperationError error = NextError(stream_, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(error.message(), HasSubstr("1..2"));
}

TEST_F(CompressStream, LayerOutOfOrderNamesTheOneExpected) {
  stream_.Begin(1, request_.spec());
  stream_.Layer(1, request_.layers(1));
  const v1::OperationError error = NextError(stream_, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(error.message(), HasSubstr("want layer 0"));
}

TEST_F(CompressStream, LayerSentTwiceIsRefused) {
  stream_.Begin(1, request_.spec());
  stream_.Layer(1, request_.layers(0));
  stream_.Layer(1, request_.layers(0));
  EXPECT_EQ(NextError(stream_, 1).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
}

TEST_F(CompressStream, ErrorEndsItsOperationAndNotTheStream) {
  v1::OperationSpec unknown = request_.spec();
  unknown.set_policy("no_such_policy");
  stream_.Begin(1, unknown);
  // On its way before the error was seen: dropped, not answered again.
  stream_.Layer(1, request_.layers(0));
  stream_.End(1);
  EXPECT_EQ(NextError(stream_, 1).code(), static_cast<int>(absl::StatusCode::kNotFound));
  SendAll(stream_, 2, request_);
  const std::optional<v1::StreamResponse> response = stream_.NextAnswer();
  ASSERT_TRUE(response.has_value() && response->has_result());
  EXPECT_EQ(response->operation_id(), 2);
}

TEST_F(CompressStream, IdOfAnEndedOperationMayBeUsedAgain) {
  for (int i = 0; i < 2; ++i) {
    SendAll(stream_, 1, request_);
    ASSERT_TRUE(stream_.NextAnswer()->has_result());
  }
}

TEST_F(CompressStream, UnknownOperationIdIsNotFound) {
  stream_.Layer(9, WireLayer(prompt_, 0));
  EXPECT_EQ(NextError(stream_, 9).code(), static_cast<int>(absl::StatusCode::kNotFound));
}

TEST_F(CompressStream, OperationIdZeroIsRefused) {
  stream_.Begin(0, WireSpec(prompt_, "tova", kBudget));
  EXPECT_EQ(NextError(stream_, 0).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
}

TEST_F(CompressStream, SecondBeginEndsTheOpenOperation) {
  stream_.Begin(1, WireSpec(prompt_, "tova", kBudget));
  stream_.Begin(1, WireSpec(prompt_, "tova", kBudget));
  const v1::OperationError error = NextError(stream_, 1);
  EXPECT_EQ(error.code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(error.message(), HasSubstr("open already"));
}

TEST_F(CompressStream, CancelIsIdempotentAndUnanswered) {
  stream_.Begin(1, request_.spec());
  stream_.Layer(1, request_.layers(0));
  stream_.Cancel(1);
  stream_.Cancel(1);
  stream_.Cancel(5);
  SendAll(stream_, 2, request_);
  const std::optional<v1::StreamResponse> response = stream_.NextAnswer();
  ASSERT_TRUE(response.has_value() && response->has_result());
  EXPECT_EQ(response->operation_id(), 2);
  EXPECT_TRUE(server_.log().AwaitLine({"operation", "outcome=cancelled"}));
}

TEST_F(CompressStream, CancelInTheMiddleOfALayerDropsTheOperation) {
  const fakes::SyntheticPrompt prompt({.seq_len = kLongPrompt});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  server_.gate().Close();
  stream_.Begin(1, request.spec());
  stream_.Layer(1, request.layers(0));
  ASSERT_TRUE(server_.gate().AwaitWaiting(1));
  stream_.Cancel(1);
  // The reader has seen the cancel once it answers what came after it.
  stream_.End(99);
  EXPECT_EQ(NextError(stream_, 99).code(), static_cast<int>(absl::StatusCode::kNotFound));
  server_.gate().Open();
  EXPECT_TRUE(Eventually([&] { return server_.server().operations_running() == 0; }));
}

TEST_F(CompressStream, HalfCloseBeforeTheEndCancelsTheOperation) {
  stream_.Begin(1, request_.spec());
  stream_.Layer(1, request_.layers(0));
  EXPECT_TRUE(stream_.Finish().ok());
  EXPECT_TRUE(server_.log().AwaitLine({"operation", "outcome=cancelled", "half-closed"}));
}

TEST_F(CompressStream, HalfCloseBeforeTheEndIsAnsweredBeforeTheStreamEnds) {
  for (uint64_t id : {1, 2, 3}) {
    stream_.Begin(id, request_.spec());
    stream_.Layer(id, request_.layers(0));
  }
  stream_.HalfClose();
  std::set<uint64_t> answered;
  for (int i = 0; i < 3; ++i) {
    const std::optional<v1::StreamResponse> response = stream_.NextAnswer();
    ASSERT_TRUE(response.has_value() && response->has_error());
    EXPECT_EQ(response->error().code(), static_cast<int>(absl::StatusCode::kCancelled));
    answered.insert(response->operation_id());
  }
  EXPECT_EQ(answered.size(), 3u);
  EXPECT_TRUE(stream_.Finish().ok());
}

TEST_F(CompressStream, HalfCloseAfterTheEndStillBringsTheResult) {
  SendAll(stream_, 1, request_);
  EXPECT_TRUE(stream_.Finish().ok());
  EXPECT_TRUE(server_.log().AwaitLine({"operation", "outcome=compressed"}));
}

TEST_F(CompressStream, DeadClientFreesItsRegions) {
  WorkerSession session(server_);
  WorkerSession::Region region = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  const v1::CompressRequest request = ToRegion(request_, session.id(), region);
  stream_.Begin(1, request.spec());
  stream_.Layer(1, request.layers(0));
  ASSERT_TRUE(Eventually([&] { return session.List().regions(0).leases() == 1; }));
  stream_.Kill();
  EXPECT_TRUE(Eventually([&] { return session.List().regions(0).leases() == 0; }));
  EXPECT_TRUE(Eventually([&] { return server_.server().operations_running() == 0; }));
}

// A backend that takes up to four layers together.
class StreamOfManyLayers : public ::testing::Test {
 protected:
  // Layers 0 to `count` - 1, of which all but the first wait while the first is worked on.
  void SendWhileTheFirstIsObserved(const v1::CompressRequest& request, int count) {
    server_.gate().Close();
    stream_.Begin(1, request.spec());
    stream_.Layer(1, request.layers(0));
    ASSERT_TRUE(server_.gate().AwaitWaiting(1));
    for (int layer = 1; layer < count; ++layer) stream_.Layer(1, request.layers(layer));
    // Messages are read in order: when this one is answered, those before it wait.
    stream_.End(99);
    EXPECT_EQ(NextError(stream_, 99).code(), static_cast<int>(absl::StatusCode::kNotFound));
    server_.gate().Open();
  }

  TestServer server_{"", 4};
  const fakes::SyntheticPrompt prompt_{{.num_layers = 7, .seq_len = kLongPrompt}};
  v1::CompressRequest request_ = WireRequest(prompt_, "snapkv", kBudget);
  WorkerStream stream_{server_};
};

TEST_F(StreamOfManyLayers, LayersThatWaitAreObservedTogether) {
  v1::OperationResult unary;
  ASSERT_TRUE(Compress(server_, request_, &unary).ok());
  const size_t before = server_.gate().layers().size();
  SendWhileTheFirstIsObserved(request_, 7);
  stream_.End(1);
  for (int layer = 0; layer < 7; ++layer) {
    const std::optional<v1::StreamResponse> early = stream_.Next();
    ASSERT_TRUE(early.has_value() && early->has_layer()) << layer;
    EXPECT_EQ(early->layer().SerializeAsString(), unary.layers(layer).SerializeAsString());
  }
  ASSERT_TRUE(stream_.Next()->has_result());
  const std::vector<size_t> groups = server_.gate().layers();
  EXPECT_EQ(std::vector<size_t>(groups.begin() + static_cast<int64_t>(before), groups.end()),
            (std::vector<size_t>{1, 4, 2}));
}

TEST_F(StreamOfManyLayers, LayersBeforeARefusedOneAreAnswered) {
  *request_.mutable_layers(3) = request_.layers(2);
  SendWhileTheFirstIsObserved(request_, 6);
  for (const uint32_t layer : {0u, 1u, 2u}) {
    const std::optional<v1::StreamResponse> early = stream_.Next();
    ASSERT_TRUE(early.has_value() && early->has_layer());
    EXPECT_EQ(early->layer().layer(), layer);
  }
  const std::optional<v1::StreamResponse> last = stream_.Next();
  ASSERT_TRUE(last.has_value() && last->has_error());
  EXPECT_THAT(last->error().message(), HasSubstr("want layer 3"));
}

TEST_F(StreamOfManyLayers, GatheredRowsAreThoseOfTheUnaryCall) {
  request_.mutable_spec()->set_gather(v1::GATHER_INLINE);
  v1::OperationResult unary;
  ASSERT_TRUE(Compress(server_, request_, &unary).ok());
  SendWhileTheFirstIsObserved(request_, 7);
  stream_.End(1);
  const std::optional<v1::StreamResponse> response = stream_.NextAnswer();
  ASSERT_TRUE(response.has_value() && response->has_result());
  for (int layer = 0; layer < 7; ++layer) {
    EXPECT_EQ(response->result().layers(layer).SerializeAsString(),
              unary.layers(layer).SerializeAsString());
  }
}

TEST(CompressStreamLimits, LayerWithoutCreditEndsItsOperation) {
  TestServer server("limits { stream_credits: 1 }");
  const fakes::SyntheticPrompt prompt({.seq_len = kLongPrompt});
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
  EXPECT_TRUE(Eventually([&] {
    const std::string page = server.server().RenderMetrics();
    return page.find("keepset_rejected_total{reason=\"no_credit\"} 1\n") != std::string::npos &&
           page.find("keepset_rejected_total{reason=\"queue_full\"} 0\n") != std::string::npos;
  }));
}

TEST(CompressStreamLimits, CreditIsOnTheMetricsPageWhileTheStreamIsOpen) {
  TestServer server("limits { stream_credits: 12 }");
  const auto outstanding = [&server](const std::string& credits) {
    return server.server().RenderMetrics().find("\nkeepset_credits_outstanding " + credits +
                                                "\n") != std::string::npos;
  };
  EXPECT_TRUE(outstanding("0"));
  {
    WorkerStream stream(server);
    ASSERT_TRUE(stream.AwaitCredit(12));
    EXPECT_TRUE(outstanding("12"));
    EXPECT_TRUE(stream.Finish().ok());
  }
  EXPECT_TRUE(Eventually([&] { return outstanding("0"); }));
}

TEST(CompressStreamLimits, CreditComesBackAsLayersAreFinished) {
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

TEST(CompressStreamLimits, InlineLimitCoversAllLayersOfAnOperation) {
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

}  // namespace
}  // namespace keepset::integration
