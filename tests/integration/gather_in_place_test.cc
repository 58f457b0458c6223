// K and V compacted where they lie: what moves, what is refused before anything does, and what a
// worker learns when it fails midway.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "absl/synchronization/notification.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint64_t kBudget = 24;

class GatherInPlace : public ::testing::Test {
 protected:
  // The prompt's tensors in region_, to be compacted there.
  v1::CompressRequest InPlace(const std::string& policy = "tova",
                              v1::RegionAccess access = v1::REGION_ACCESS_READ_WRITE) {
    region_ = session_.Register("kv", 1 << 20, access);
    v1::CompressRequest request =
        ToRegion(WireRequest(prompt_, policy, kBudget), session_.id(), region_);
    request.mutable_spec()->set_gather(v1::GATHER_IN_PLACE);
    before_.assign(region_.data, region_.data + region_.bytes);
    return request;
  }

  void ExpectNothingMoved() const {
    EXPECT_EQ(std::memcmp(region_.data, before_.data(), before_.size()), 0);
  }

  void ExpectRefused(const v1::CompressRequest& request, grpc::StatusCode code,
                     const std::string& message) {
    const grpc::Status status = Compress(server_, request, nullptr);
    EXPECT_EQ(status.error_code(), code);
    EXPECT_THAT(status.error_message(), HasSubstr(message));
    ExpectNothingMoved();
  }

  // Row `i` of `head` holds what row `kept[i]` held, and the rows behind are as they were.
  void ExpectCompacted(const v1::KvTensor& wire, const kernels::KvView& source, int64_t head,
                       const v1::KeepSet& set) const {
    std::vector<int32_t> kept(set.kept());
    std::memcpy(kept.data(), set.indices().data(), set.indices().size());
    const auto row = [&](const std::byte* base, int64_t t) {
      int64_t element = head * source.head_stride;
      if (source.block_size > 0) {
        element += source.block_table[t / source.block_size] * source.block_stride +
                   t % source.block_size * source.token_stride;
      } else {
        element += t * source.token_stride;
      }
      return std::string(reinterpret_cast<const char*>(base) + element * 4, source.head_dim * 4);
    };
    const std::byte* const now = region_.data + wire.data().region().offset();
    for (int64_t t = 0; t < source.seq_len; ++t) {
      const int64_t from = t < static_cast<int64_t>(kept.size()) ? kept[t] : t;
      ASSERT_EQ(row(now, t), row(source.data, from)) << "head " << head << " row " << t;
    }
  }

  void ExpectCompacted(const v1::CompressRequest& request, const v1::OperationResult& result) {
    EXPECT_EQ(result.outcome(), v1::OUTCOME_COMPRESSED);
    EXPECT_TRUE(result.gathered());
    for (int l = 0; l < result.layers_size(); ++l) {
      const engine::LayerObservation source = prompt_.observation(l);
      for (int64_t head = 0; head < prompt_.shape().num_kv_heads; ++head) {
        const int set = result.layers(l).sets_size() == 1 ? 0 : static_cast<int>(head);
        ExpectCompacted(request.layers(l).k(), source.k, head, result.layers(l).sets(set));
        ExpectCompacted(request.layers(l).v(), source.v, head, result.layers(l).sets(set));
      }
    }
  }

  TestServer server_;
  fakes::SyntheticPrompt prompt_{{}};
  WorkerSession session_{server_};
  WorkerSession::Region region_;
  std::vector<std::byte> before_;
};

TEST_F(GatherInPlace, KeptRowsMoveToTheFrontOfTheWorkersCache) {
  for (const char* const policy : {"tova", "snapkv"}) {  // a shared set, and one per KV head
    const v1::CompressRequest request = InPlace(policy);
    v1::OperationResult result;
    const grpc::Status status = Compress(server_, request, &result);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ExpectCompacted(request, result);
    ASSERT_TRUE(session_.Retire(region_.id, 1000).ok());
  }
}

TEST_F(GatherInPlace, PagesOfATableThatLayersShare) {
  fakes::PromptShape shape;
  shape.layout = fakes::KvLayout::kPaged;
  prompt_ = fakes::SyntheticPrompt(shape);
  v1::CompressRequest request = InPlace();
  *request.mutable_spec()->mutable_block_table() = request.layers(0).k().block_table();
  for (v1::LayerInput& layer : *request.mutable_layers()) {
    layer.mutable_k()->clear_block_table();
    layer.mutable_v()->clear_block_table();
  }
  v1::OperationResult result;
  const grpc::Status status = Compress(server_, request, &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ExpectCompacted(request, result);
}

TEST_F(GatherInPlace, OnAStream) {
  const v1::CompressRequest request = InPlace();
  WorkerStream stream(server_);
  stream.Begin(1, request.spec());
  for (const v1::LayerInput& layer : request.layers()) stream.Layer(1, layer);
  stream.End(1);
  const auto answer = stream.NextAnswer();
  ASSERT_TRUE(answer.has_value() && answer->has_result());
  ExpectCompacted(request, answer->result());
}

// Whoever reads an error other than DATA_LOSS goes on with its cache: no message behind the end may
// bring one while rows move.
TEST_F(GatherInPlace, WhatComesBehindTheEndIsRefusedAlone) {
  // Not short: a worker moves the rows, and the reader goes on.
  prompt_ = fakes::SyntheticPrompt({.num_layers = 2, .seq_len = 1024});
  const v1::CompressRequest request = InPlace();
  absl::Notification moving;
  absl::Notification go_on;
  server_.gate().AnswerCompaction(2, [&] {
    moving.Notify();
    go_on.WaitForNotification();
    return absl::OkStatus();
  });
  WorkerStream stream(server_);
  stream.Begin(1, request.spec());
  for (const v1::LayerInput& layer : request.layers()) stream.Layer(1, layer);
  stream.End(1);
  moving.WaitForNotification();
  v1::LayerInput unleased = request.layers(0);
  unleased.mutable_k()->mutable_data()->mutable_region()->set_region_id("no such region");
  stream.Begin(1, request.spec());
  stream.Layer(1, unleased);
  stream.End(1);
  // The reader has seen them once it answers what came after them.
  stream.End(99);
  auto answer = stream.NextAnswer();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->operation_id(), 99) << answer->ShortDebugString();
  go_on.Notify();
  answer = stream.NextAnswer();
  ASSERT_TRUE(answer.has_value() && answer->has_result());
  EXPECT_EQ(answer->operation_id(), 1);
  ExpectCompacted(request, answer->result());
  answer = stream.NextAnswer();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->operation_id(), 1);
  EXPECT_EQ(answer->error().code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(answer->error().message(), HasSubstr("had its end"));
  EXPECT_TRUE(stream.Finish().ok());
}

TEST_F(GatherInPlace, KeptFullMovesNothing) {
  v1::CompressRequest request = InPlace();
  request.mutable_spec()->mutable_budget()->set_tokens(prompt_.shape().seq_len);
  v1::OperationResult result;
  ASSERT_TRUE(Compress(server_, request, &result).ok());
  EXPECT_EQ(result.outcome(), v1::OUTCOME_KEPT_FULL);
  EXPECT_FALSE(result.gathered());
  ExpectNothingMoved();
}

TEST_F(GatherInPlace, ReadOnlyRegionIsRefused) {
  ExpectRefused(InPlace("tova", v1::REGION_ACCESS_READ_ONLY), grpc::StatusCode::FAILED_PRECONDITION,
                "layer 0: k: the region is registered read-only, want read-write");
}

TEST_F(GatherInPlace, InlineTensorIsRefused) {
  v1::CompressRequest request = InPlace();
  *request.mutable_layers(1)->mutable_v() = WireRequest(prompt_, "tova", kBudget).layers(1).v();
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT,
                "layer 1: v: no region, want a slice of a read-write region");
}

TEST_F(GatherInPlace, SharedPrefixIsRefused) {
  v1::CompressRequest request = InPlace();
  request.mutable_spec()->set_shared_prefix_tokens(16);
  ExpectRefused(request, grpc::StatusCode::FAILED_PRECONDITION,
                "shared_prefix_tokens=16: other sequences use these blocks, want 0");
}

TEST_F(GatherInPlace, BlockThatIsTwiceInTheTableIsRefused) {
  fakes::PromptShape shape;
  shape.layout = fakes::KvLayout::kPaged;
  prompt_ = fakes::SyntheticPrompt(shape);
  v1::CompressRequest request = InPlace();
  v1::KvTensor& v = *request.mutable_layers(2)->mutable_v();
  v.set_block_table(1, v.block_table(0));
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "is in block_table twice, want once");
}

TEST_F(GatherInPlace, DestinationBesideItIsRefused) {
  v1::CompressRequest request = InPlace();
  request.mutable_layers(0)->mutable_destination()->set_capacity_tokens(kBudget);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT,
                "layer 0: destination is given, want none with GATHER_IN_PLACE");
}

TEST_F(GatherInPlace, TensorsThatShareBytesAreRefused) {
  v1::CompressRequest request = InPlace();
  *request.mutable_layers(2)->mutable_v() = request.layers(0).k();
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT,
                "layer 2: v shares bytes with layer 0: k, want disjoint memory");
}

TEST_F(GatherInPlace, DestinationThatIsTheSourceStaysRefusedWithoutIt) {
  v1::CompressRequest request = InPlace();
  request.mutable_spec()->set_gather(v1::GATHER_DESTINATION);
  for (v1::LayerInput& layer : *request.mutable_layers()) {
    layer.mutable_destination()->set_capacity_tokens(prompt_.shape().seq_len);
    *layer.mutable_destination()->mutable_k() = layer.k();
    *layer.mutable_destination()->mutable_v() = layer.v();
  }
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "shares bytes with layer 0: k");
}

// The device's memory is full of other operations: the worker's cache is as it was.
TEST_F(GatherInPlace, WithoutMemoryForItEverythingIsKept) {
  const v1::CompressRequest request = InPlace();
  server_.gate().FailReservations(absl::ResourceExhaustedError("cuda: no memory"));
  v1::OperationResult result;
  const grpc::Status status = Compress(server_, request, &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(result.outcome(), v1::OUTCOME_KEPT_FULL);
  EXPECT_EQ(result.reason(), v1::REASON_SHED);
  EXPECT_FALSE(result.gathered());
  ExpectNothingMoved();
}

TEST_F(GatherInPlace, FailureAfterTheFirstRowSaysThatTheCacheIsLost) {
  const v1::CompressRequest request = InPlace();
  // K and V of layer 0 are moved, K of layer 1 is not.
  server_.gate().FailCompaction(2, absl::InternalError("cuda: illegal address"));
  const grpc::Status status = Compress(server_, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_THAT(status.error_message(), HasSubstr("K and V were being moved in place"));
  EXPECT_THAT(status.error_message(), Not(HasSubstr("illegal address")));
  EXPECT_TRUE(server_.log().AwaitLine({"layer 1: gather in place of k", "illegal address"}))
      << server_.log().text();
}

}  // namespace
}  // namespace keepset::integration
