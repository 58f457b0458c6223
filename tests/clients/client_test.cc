// The client over real sockets against a scripted server.
#include "clients/cpp/client.h"

#include <stdlib.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/fake_keepsetd.h"

namespace keepset::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(30);
constexpr absl::Duration kImpatience = absl::Milliseconds(300);
constexpr int64_t kLayers = 5;
constexpr int64_t kSeqLen = 16;
constexpr int64_t kBudget = 3;
constexpr int64_t kKvBytes = 2 * kSeqLen * 4 * 4;  // [2, T, 4] F32

class ClientTest : public ::testing::Test {
 protected:
  ClientTest() {
    std::string name = (std::filesystem::temp_directory_path() / "client-XXXXXX").string();
    directory_ = mkdtemp(name.data());
  }
  ~ClientTest() override {
    client_.reset();
    server_.reset();
    std::filesystem::remove_all(directory_);
  }

  void Start(FakeOptions options = {}) { server_ = FakeKeepsetd::Start(directory_, options); }

  absl::Status Connect(Transport transport, absl::Duration call_timeout = kPatience) {
    ClientOptions options;
    options.address = "unix:" + directory_ + "/keepset.sock";
    options.transport = transport;
    options.call_timeout = call_timeout;
    absl::StatusOr<std::unique_ptr<Client>> client = Client::Connect(options);
    if (client.ok()) client_ = *std::move(client);
    return client.status();
  }

  OperationSpec Spec(const std::string& policy = "tova") const {
    OperationSpec spec;
    spec.model = {"llama", kLayers, 4, 2, 4, "", ""};
    spec.seq_len = kSeqLen;
    spec.num_rows = 1;
    spec.softmax_scale = 0.5f;
    spec.policy = policy;
    spec.budget.kind = Budget::Kind::kTokens;
    spec.budget.tokens = kBudget;
    return spec;
  }

  // Every layer the same K and V at `kv`.
  std::vector<LayerInput> Layers(const std::byte* kv) const {
    std::vector<LayerInput> layers(kLayers);
    for (int64_t l = 0; l < kLayers; ++l) {
      layers[l].layer = l;
      layers[l].k.data = kv;
      layers[l].k.size_bytes = kKvBytes;
      layers[l].v = layers[l].k;
    }
    return layers;
  }
  std::vector<LayerInput> OwnLayers() const { return Layers(own_.data()); }

  // Registers `region_` read-write and answers layers whose tensors and destinations lie in it.
  std::vector<LayerInput> SharedLayers() {
    region_ = *SharedRegion::Create("test", (1 + 2 * kLayers) * kKvBytes);
    std::vector<LayerInput> layers = Layers(*region_->Allocate(kKvBytes));
    for (LayerInput& layer : layers) {
      Destination destination;
      destination.capacity_tokens = kSeqLen;
      for (KvTensor* tensor : {&destination.k, &destination.v}) {
        tensor->data = *region_->Allocate(kKvBytes);
        tensor->size_bytes = kKvBytes;
      }
      layer.destination = destination;
    }
    EXPECT_TRUE(client_->RegisterRegion(*region_, "kv", RegionAccess::kReadWrite).ok());
    return layers;
  }

  std::string directory_;
  std::vector<std::byte> own_ = std::vector<std::byte>(kKvBytes);
  std::unique_ptr<SharedRegion> region_;
  std::unique_ptr<FakeKeepsetd> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(ClientTest, NobodyThereIsUnavailableAndNamesTheAddress) {
  const absl::Status status = Connect(Transport::kAuto);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr(directory_));
}

TEST_F(ClientTest, AddressOfAnotherFormIsInvalid) {
  ClientOptions options;
  options.address = "keepset.sock";
  EXPECT_EQ(Client::Connect(options).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ClientTest, AutoChoosesMemfdOnAUnixSocket) {
  Start();
  ASSERT_TRUE(Connect(Transport::kAuto).ok());
  EXPECT_EQ(client_->transport(), Transport::kMemfd);
}

TEST_F(ClientTest, AutoFallsBackToInlineAndSaysWhy) {
  FakeOptions options;
  options.has_side_socket = false;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kAuto).ok());
  EXPECT_EQ(client_->transport(), Transport::kInline);
  EXPECT_THAT(client_->transport_reason(), HasSubstr("side socket"));
}

TEST_F(ClientTest, MemfdIsNeverReplacedSilently) {
  FakeOptions options;
  options.offers_memfd = false;
  Start(options);
  EXPECT_EQ(Connect(Transport::kMemfd).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ClientTest, UnaryInlineBringsKeepIndices) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto result = client_->CompressUnary(Spec(), OwnLayers());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->transport, "inline");
  EXPECT_THAT(result->layers[4].sets[0].keep_indices, ElementsAre(0, 1, 2));
}

TEST_F(ClientTest, TensorsInARegionTravelAsSlices) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  const auto result = client_->CompressUnary(Spec(), SharedLayers());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->transport, "memfd");
}

TEST_F(ClientTest, KOutsideEveryRegionIsRefusedWithMemfd) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  EXPECT_EQ(client_->CompressUnary(Spec(), OwnLayers()).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(ClientTest, GatheredRowsAreViewsOfTheDestination) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  const std::vector<LayerInput> layers = SharedLayers();
  OperationSpec spec = Spec();
  spec.gather = GatherMode::kDestination;
  const auto result = client_->CompressUnary(spec, layers);
  ASSERT_TRUE(result.ok()) << result.status();
  const GatheredHead& head = result->layers[2].gathered.at(1);
  EXPECT_TRUE(region_->Contains(head.k, head.num_tokens * head.k_row_bytes));
  EXPECT_EQ(head.num_tokens, kBudget);
  EXPECT_EQ(*head.v, kGatheredByte);
}

TEST_F(ClientTest, GatheredRowsComeInline) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  OperationSpec spec = Spec();
  spec.gather = GatherMode::kInline;
  const auto result = client_->CompressUnary(spec, OwnLayers());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(*result->layers[0].gathered.at(1).v, kGatheredByte);
}

TEST_F(ClientTest, StreamBringsTheSameAnswerAsUnary) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto result = client_->CompressStreamed(Spec(), OwnLayers());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layers.size(), kLayers);
  EXPECT_THAT(result->layers[4].sets[0].keep_indices, ElementsAre(0, 1, 2));
}

TEST_F(ClientTest, StreamNeverSendsMoreLayersThanGranted) {
  FakeOptions options;
  options.stream_credits = 2;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  ASSERT_TRUE(client_->CompressStreamed(Spec(), OwnLayers()).ok());
  EXPECT_LE(server_->Observed().max_layers_in_flight, 2);
}

TEST_F(ClientTest, OneStreamCarriesManyOperations) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto stream = *client_->OpenStream();
  const std::vector<LayerInput> layers = OwnLayers();
  const uint64_t a = *stream->Begin(Spec());
  const uint64_t b = *stream->Begin(Spec());
  for (const LayerInput& layer : layers) {
    ASSERT_TRUE(stream->SendLayer(a, layer).ok());
    ASSERT_TRUE(stream->SendLayer(b, layer).ok());
  }
  EXPECT_TRUE(stream->Finish(b).ok());
  EXPECT_TRUE(stream->Finish(a).ok());
}

TEST_F(ClientTest, RefusedOperationLeavesTheStreamUsable) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto stream = *client_->OpenStream();
  const uint64_t refused = *stream->Begin(Spec(kRefusedPolicy));
  EXPECT_EQ(stream->Finish(refused).status().code(), absl::StatusCode::kInvalidArgument);
  const uint64_t fine = *stream->Begin(Spec());
  for (const LayerInput& layer : OwnLayers()) ASSERT_TRUE(stream->SendLayer(fine, layer).ok());
  EXPECT_TRUE(stream->Finish(fine).ok());
}

TEST_F(ClientTest, FinishedOperationIsUnknown) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto stream = *client_->OpenStream();
  EXPECT_EQ(stream->Finish(77).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ClientTest, WaitingForACreditEndsAtTheTimeLimit) {
  FakeOptions options;
  options.stream_credits = 1;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kInline, kImpatience).ok());
  EXPECT_EQ(client_->CompressStreamed(Spec(kSilentPolicy), OwnLayers()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ClientTest, LayersAreHandedOverWhileTheServerIsBusy) {
  FakeOptions options;
  options.stream_credits = 100;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto stream = *client_->OpenStream();
  const uint64_t operation = *stream->Begin(Spec(kDeafPolicy));
  // More than the transport takes without a reader, less than the client does.
  std::vector<std::byte> rows(1 << 17);
  for (LayerInput& layer : Layers(rows.data())) {
    layer.k.size_bytes = static_cast<int64_t>(rows.size());
    EXPECT_TRUE(stream->SendLayer(operation, layer).ok());
  }
}

TEST_F(ClientTest, LayersThatNobodyReadsEndTheStreamAtTheTimeLimit) {
  FakeOptions options;
  options.stream_credits = 100;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kInline, kImpatience).ok());
  const auto stream = *client_->OpenStream();
  const uint64_t operation = *stream->Begin(Spec(kDeafPolicy));
  std::vector<std::byte> rows(4 << 20);
  absl::Status sent;
  for (LayerInput& layer : Layers(rows.data())) {
    layer.k.size_bytes = static_cast<int64_t>(rows.size());
    sent = stream->SendLayer(operation, layer);
    if (!sent.ok()) break;
  }
  EXPECT_EQ(sent.code(), absl::StatusCode::kDeadlineExceeded) << sent;
  EXPECT_FALSE(stream->Begin(Spec()).ok());
}

TEST_F(ClientTest, WaitingForAResultEndsAtTheTimeLimitAndCancels) {
  FakeOptions options;
  options.stream_credits = 100;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kInline, kImpatience).ok());
  const auto stream = *client_->OpenStream();
  const uint64_t silent = *stream->Begin(Spec(kSilentPolicy));
  EXPECT_EQ(stream->Finish(silent).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(server_->Await(
      [](const FakeObservations& seen) { return seen.cancelled_operations == 1; }, kPatience));
}

TEST_F(ClientTest, CancelOfAnotherThreadEndsTheWaitForAResult) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto stream = *client_->OpenStream();
  const uint64_t silent = *stream->Begin(Spec(kSilentPolicy));
  absl::Status finished;
  std::thread waiting([&] { finished = stream->Finish(silent).status(); });
  EXPECT_TRUE(server_->Await(
      [](const FakeObservations& seen) { return seen.ended_operations == 1; }, kPatience));
  EXPECT_TRUE(stream->Cancel(silent).ok());
  waiting.join();
  EXPECT_EQ(finished.code(), absl::StatusCode::kCancelled) << finished;
  EXPECT_EQ(stream->Finish(silent).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ClientTest, UnaryCallEndsAtTheTimeLimit) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline, kImpatience).ok());
  EXPECT_EQ(client_->CompressUnary(Spec(kSilentPolicy), OwnLayers()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(ClientTest, RefusalKeepsItsCodeAndMessage) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const absl::Status status = client_->CompressUnary(Spec(kRefusedPolicy), OwnLayers()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "refused by script");
}

TEST_F(ClientTest, LyingReplyIsInternal) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  EXPECT_EQ(client_->CompressUnary(Spec(kLyingPolicy), OwnLayers()).status().code(),
            absl::StatusCode::kInternal);
}

TEST_F(ClientTest, TooManyInlineBytesAreRefusedBeforeSending) {
  FakeOptions options;
  options.max_inline_bytes = 100;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const absl::Status status = client_->CompressUnary(Spec(), OwnLayers()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("100"));
}

TEST_F(ClientTest, HeartbeatRunsWhileTheSessionLives) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  EXPECT_TRUE(
      server_->Await([](const FakeObservations& seen) { return seen.beats >= 2; }, kPatience));
  EXPECT_TRUE(client_->SessionStatus().ok());
}

TEST_F(ClientTest, DestructionHangsUpAndClosesTheSession) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  client_.reset();
  EXPECT_TRUE(server_->Await(
      [](const FakeObservations& seen) { return seen.hang_ups == 1 && seen.closed_sessions == 1; },
      kPatience));
}

TEST_F(ClientTest, RetiredRegionIsForgotten) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  const std::vector<LayerInput> layers = SharedLayers();
  EXPECT_TRUE(client_->RetireRegion("kv").ok());
  EXPECT_THAT(server_->Observed().retired, ElementsAre("r1"));
  EXPECT_EQ(client_->CompressUnary(Spec(), layers).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(ClientTest, RetiringARegionInUseCanBeAskedAgain) {
  FakeOptions options;
  options.retires_in_use = 1;
  Start(options);
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  const std::vector<LayerInput> layers = SharedLayers();
  EXPECT_EQ(client_->RetireRegion("kv").code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(client_->CompressUnary(Spec(), layers).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(client_->RetireRegion("kv").ok());
  EXPECT_THAT(server_->Observed().retired, ElementsAre("r1", "r1"));
  EXPECT_EQ(client_->RetireRegion("kv").code(), absl::StatusCode::kNotFound);
}

TEST_F(ClientTest, RetiringAnUnknownRegionIsNotFound) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  EXPECT_EQ(client_->RetireRegion("kv").code(), absl::StatusCode::kNotFound);
}

TEST_F(ClientTest, ReopenAfterARestartKeepsUuidAndRegions) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  const std::vector<LayerInput> layers = SharedLayers();
  const std::vector<std::string> first = server_->Observed().client_uuids;
  server_.reset();
  Start();
  ASSERT_TRUE(client_->Reopen().ok());
  EXPECT_EQ(server_->Observed().client_uuids, first);
  EXPECT_THAT(server_->Observed().region_names, ElementsAre("kv"));
  EXPECT_TRUE(client_->CompressUnary(Spec(), layers).ok());
}

TEST_F(ClientTest, ReopenTwiceIsHarmless) {
  Start();
  ASSERT_TRUE(Connect(Transport::kMemfd).ok());
  const std::vector<LayerInput> layers = SharedLayers();
  EXPECT_TRUE(client_->Reopen().ok());
  EXPECT_TRUE(client_->Reopen().ok());
  EXPECT_TRUE(client_->CompressUnary(Spec(), layers).ok());
}

TEST_F(ClientTest, ServerThatGoesAwayIsUnavailable) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  server_.reset();
  EXPECT_EQ(client_->CompressUnary(Spec(), OwnLayers()).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(ClientTest, StreamOfAServerThatGoesAwayEnds) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  const auto stream = *client_->OpenStream();
  const uint64_t operation = *stream->Begin(Spec(kSilentPolicy));
  server_.reset();
  EXPECT_FALSE(stream->Finish(operation).ok());
}

TEST_F(ClientTest, ManyThreadsShareOneClient) {
  Start();
  ASSERT_TRUE(Connect(Transport::kInline).ok());
  std::vector<std::thread> threads;
  std::vector<absl::Status> statuses(4);
  for (absl::Status& status : statuses) {
    threads.emplace_back(
        [this, &status] { status = client_->CompressUnary(Spec(), OwnLayers()).status(); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace keepset::client
