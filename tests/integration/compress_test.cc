#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>

#include "absl/synchronization/notification.h"
#include "tests/engine/run_operation.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;

std::vector<int32_t> Indices(const v1::KeepSet& set, int64_t seq_len) {
  std::vector<int32_t> indices(set.kept());
  if (set.all()) {
    for (int32_t t = 0; t < seq_len; ++t) indices[t] = t;
  } else {
    EXPECT_EQ(set.indices().size(), indices.size() * sizeof(int32_t));
    std::memcpy(indices.data(), set.indices().data(), set.indices().size());
  }
  return indices;
}

void ExpectSameSets(const v1::OperationResult& wire, const engine::OperationResult& direct) {
  ASSERT_EQ(wire.layers_size(), static_cast<int>(direct.layers.size()));
  for (int l = 0; l < wire.layers_size(); ++l) {
    ASSERT_EQ(wire.layers(l).sets_size(), static_cast<int>(direct.layers[l].keep_indices.size()));
    for (int s = 0; s < wire.layers(l).sets_size(); ++s) {
      EXPECT_EQ(Indices(wire.layers(l).sets(s), wire.seq_len()), direct.layers[l].keep_indices[s])
          << "layer " << l << " set " << s;
    }
  }
}

engine::OperationResult InProcess(const fakes::SyntheticPrompt& prompt, const std::string& policy) {
  engine::Bench bench;
  engine::OperationSpec spec = prompt.spec();
  spec.policy = policy;
  spec.budget = {.kind = engine::Budget::Kind::kTokens, .tokens = kBudget};
  absl::StatusOr<engine::OperationResult> result = bench.Run(spec, prompt);
  EXPECT_TRUE(result.ok()) << result.status();
  return *std::move(result);
}

// Row `t` of KV head `g` as the worker holds it.
std::string SourceRow(const kernels::KvView& view, int64_t g, int64_t t) {
  const int64_t bytes = kernels::DTypeBytes(view.dtype);
  const std::byte* row = view.data + (g * view.head_stride + t * view.token_stride) * bytes;
  return {reinterpret_cast<const char*>(row), static_cast<size_t>(view.head_dim * bytes)};
}

TEST(Compress, InlineGivesTheAnswerOfTheLibrary) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::OperationResult result;
  const grpc::Status status = Compress(server, WireRequest(prompt, "snapkv", kBudget), &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(result.outcome(), v1::OUTCOME_COMPRESSED);
  EXPECT_EQ(result.transport(), "inline");
  ExpectSameSets(result, InProcess(prompt, "snapkv"));
}

TEST(Compress, LayersTakenTogetherGiveTheAnswerOfOneByOne) {
  TestServer one_by_one;
  const fakes::SyntheticPrompt prompt({.num_layers = 7});
  for (const int64_t layers_at_once : {3, 40}) {
    TestServer together("", layers_at_once);
    for (const char* policy : {"snapkv", "tova", "knorm", "streaming_llm"}) {
      v1::CompressRequest request = WireRequest(prompt, policy, kBudget);
      request.mutable_spec()->set_gather(v1::GATHER_INLINE);
      v1::OperationResult want;
      v1::OperationResult got;
      ASSERT_TRUE(Compress(one_by_one, request, &want).ok());
      const grpc::Status status = Compress(together, request, &got);
      ASSERT_TRUE(status.ok()) << status.error_message();
      ASSERT_EQ(got.layers_size(), 7);
      for (int l = 0; l < got.layers_size(); ++l) {
        EXPECT_EQ(got.layers(l).SerializeAsString(), want.layers(l).SerializeAsString())
            << policy << " layer " << l;
      }
    }
  }
}

TEST(Compress, OfLayersTakenTogetherTheFirstThatIsWrongIsNamed) {
  TestServer one_by_one;
  TestServer together("", 40);
  const fakes::SyntheticPrompt prompt({.num_layers = 7});
  // Not a number in layer 2, and a shape in layer 5 that cannot be decoded.
  v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  std::string& k = *request.mutable_layers(2)->mutable_k()->mutable_data()->mutable_inline_();
  const float nan = std::nanf("");
  std::memcpy(k.data() + 5 * sizeof(float), &nan, sizeof(nan));
  request.mutable_layers(5)->mutable_k()->mutable_data()->mutable_inline_()->resize(8);
  for (const char* want : {"layer 2", "layer 5"}) {
    const grpc::Status alone = Compress(one_by_one, request, nullptr);
    EXPECT_EQ(alone.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(alone.error_message(), HasSubstr(want));
    EXPECT_EQ(Compress(together, request, nullptr).error_message(), alone.error_message());
    *request.mutable_layers(2) = WireLayer(prompt, 2);
  }
}

TEST(Compress, MemfdGivesTheAnswerOfInline) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest inlined = WireRequest(prompt, "tova", kBudget);
  WorkerSession session(server);
  WorkerSession::Region region = session.Register("pool", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  v1::OperationResult result;
  const grpc::Status status = Compress(server, ToRegion(inlined, session.id(), region), &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(result.transport(), "memfd");
  ExpectSameSets(result, InProcess(prompt, "tova"));
}

TEST(Compress, PagedTensorsGiveTheAnswerOfContiguousOnes) {
  TestServer server;
  fakes::PromptShape shape;
  shape.seq_len = 90;
  const fakes::SyntheticPrompt contiguous(shape);
  shape.layout = fakes::KvLayout::kPaged;
  const fakes::SyntheticPrompt paged(shape);
  v1::OperationResult result;
  const grpc::Status status = Compress(server, WireRequest(paged, "snapkv", kBudget), &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ExpectSameSets(result, InProcess(contiguous, "snapkv"));
}

TEST(Compress, BlockTableOfTheSpecServesLayersWithoutOne) {
  TestServer server;
  fakes::PromptShape shape;
  shape.layout = fakes::KvLayout::kPaged;
  const fakes::SyntheticPrompt prompt(shape);
  v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  *request.mutable_spec()->mutable_block_table() = request.layers(0).k().block_table();
  for (v1::LayerInput& layer : *request.mutable_layers()) {
    layer.mutable_k()->clear_block_table();
    layer.mutable_v()->clear_block_table();
  }
  v1::OperationResult result;
  const grpc::Status status = Compress(server, request, &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ExpectSameSets(result, InProcess(prompt, "snapkv"));
}

TEST(Compress, BudgetOfThePromptKeepsFullWithReason) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "snapkv", 4096);
  request.mutable_spec()->set_gather(v1::GATHER_INLINE);
  v1::OperationResult result;
  ASSERT_TRUE(Compress(server, request, &result).ok());
  EXPECT_EQ(result.outcome(), v1::OUTCOME_KEPT_FULL);
  EXPECT_EQ(result.reason(), v1::REASON_BELOW_BUDGET);
  EXPECT_TRUE(result.layers(0).sets(0).all());
  EXPECT_FALSE(result.gathered());
}

TEST(Compress, GatherInlineBringsTheKeptRowsOfASharedSet) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  request.mutable_spec()->set_gather(v1::GATHER_INLINE);
  v1::OperationResult result;
  ASSERT_TRUE(Compress(server, request, &result).ok());
  EXPECT_TRUE(result.gathered());
  for (int l = 0; l < result.layers_size(); ++l) {
    std::string k;
    std::string v;
    const std::vector<int32_t> kept = Indices(result.layers(l).sets(0), 0);
    for (int64_t g = 0; g < prompt.shape().num_kv_heads; ++g) {
      for (const int32_t t : kept) {
        k += SourceRow(prompt.observation(l).k, g, t);
        v += SourceRow(prompt.observation(l).v, g, t);
      }
    }
    EXPECT_EQ(result.layers(l).k(), k);
    EXPECT_EQ(result.layers(l).v(), v);
  }
}

TEST(Compress, GatherInlineBringsEachHeadsOwnRows) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  request.mutable_spec()->set_gather(v1::GATHER_INLINE);
  v1::OperationResult result;
  ASSERT_TRUE(Compress(server, request, &result).ok());
  ASSERT_EQ(result.layers(0).sets_size(), 2);
  std::string k;
  for (int64_t g = 0; g < 2; ++g) {
    for (const int32_t t : Indices(result.layers(0).sets(g), 0)) {
      k += SourceRow(prompt.observation(0).k, g, t);
    }
  }
  EXPECT_EQ(result.layers(0).k(), k);
}

TEST(Compress, GatherIntoADestinationWritesTheWorkersMemory) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  WorkerSession::Region source = session.Register("kv", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  WorkerSession::Region target = session.Register("out", 1 << 20, v1::REGION_ACCESS_READ_WRITE);
  v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "tova", kBudget), session.id(), source);
  request.mutable_spec()->set_gather(v1::GATHER_DESTINATION);
  RegionWriter writer(target);
  const fakes::PromptShape& shape = prompt.shape();
  const size_t bytes = shape.num_kv_heads * kBudget * shape.head_dim * 4;
  std::vector<uint64_t> k_offsets;
  for (v1::LayerInput& layer : *request.mutable_layers()) {
    layer.mutable_destination()->set_capacity_tokens(kBudget);
    for (v1::KvTensor* tensor :
         {layer.mutable_destination()->mutable_k(), layer.mutable_destination()->mutable_v()}) {
      tensor->set_dtype(v1::DTYPE_F32);
      const uint64_t offset = writer.Reserve(bytes, tensor->mutable_data());
      if (tensor == layer.mutable_destination()->mutable_k()) k_offsets.push_back(offset);
    }
  }
  v1::OperationResult result;
  const grpc::Status status = Compress(server, request, &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(result.gathered());
  for (int l = 0; l < result.layers_size(); ++l) {
    const std::vector<int32_t> kept = Indices(result.layers(l).sets(0), 0);
    for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
      for (size_t i = 0; i < kept.size(); ++i) {
        const std::byte* row =
            target.data + k_offsets[l] + (g * kBudget + i) * shape.head_dim * sizeof(float);
        EXPECT_EQ(std::string(reinterpret_cast<const char*>(row), shape.head_dim * sizeof(float)),
                  SourceRow(prompt.observation(l).k, g, kept[i]));
      }
    }
  }
}

TEST(Compress, BaseTwoLogSumExpGivesTheAnswerOfTheNaturalOne) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const fakes::PromptShape& shape = prompt.shape();
  v1::CompressRequest natural = WireRequest(prompt, "snapkv", kBudget);
  for (v1::LayerInput& layer : *natural.mutable_layers()) {
    std::vector<float> lse;
    for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
      for (int64_t i = 0; i < shape.num_rows; ++i) {
        double sum = 0.0;
        const int64_t g = h / (shape.num_qo_heads / shape.num_kv_heads);
        for (int64_t t = 0; t <= shape.seq_len - shape.num_rows + i; ++t) {
          double dot = 0.0;
          for (int64_t c = 0; c < shape.head_dim; ++c) {
            dot += prompt.q(layer.layer(), h, i, c) * prompt.k(layer.layer(), g, t, c);
          }
          sum += std::exp(dot * prompt.softmax_scale());
        }
        lse.push_back(static_cast<float>(std::log(sum)));
      }
    }
    layer.mutable_window_lse()->mutable_data()->set_inline_(lse.data(), lse.size() * 4);
    layer.mutable_window_lse()->set_dtype(v1::DTYPE_F32);
    layer.set_lse_base(v1::LSE_BASE_E);
  }
  v1::CompressRequest base_two = natural;
  for (v1::LayerInput& layer : *base_two.mutable_layers()) {
    std::string* bytes = layer.mutable_window_lse()->mutable_data()->mutable_inline_();
    std::vector<float> lse(bytes->size() / 4);
    std::memcpy(lse.data(), bytes->data(), bytes->size());
    for (float& value : lse) value /= 0.69314718f;
    std::memcpy(bytes->data(), lse.data(), bytes->size());
    layer.set_lse_base(v1::LSE_BASE_2);
  }
  v1::OperationResult from_natural;
  v1::OperationResult from_base_two;
  ASSERT_TRUE(Compress(server, natural, &from_natural).ok());
  const grpc::Status status = Compress(server, base_two, &from_base_two);
  ASSERT_TRUE(status.ok()) << status.error_message();
  for (int l = 0; l < from_natural.layers_size(); ++l) {
    for (int s = 0; s < from_natural.layers(l).sets_size(); ++s) {
      EXPECT_EQ(from_natural.layers(l).sets(s).indices(),
                from_base_two.layers(l).sets(s).indices());
    }
  }
}

TEST(Compress, StaleGenerationOfARequestIsAborted) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerSession session(server);
  v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  request.mutable_spec()->set_session_id(session.id());
  request.mutable_spec()->set_request_generation(5);
  ASSERT_TRUE(Compress(server, request, nullptr).ok());
  request.mutable_spec()->set_request_generation(4);
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("request_generation=4"));
}

TEST(Compress, SoftDeadlineKeepsFull) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  server.gate().Close();
  v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  request.mutable_spec()->set_deadline_ms(1);
  const auto context = NewContext();
  const auto stub = server.compression();
  v1::CompressResponse response;
  absl::Notification done;
  grpc::Status status;
  stub->async()->Compress(context.get(), &request, &response, [&](grpc::Status s) {
    status = std::move(s);
    done.Notify();
  });
  // Either the deadline passes before the first layer is scored, or while it stands at the gate.
  const absl::Time start = absl::Now();
  ASSERT_TRUE(Eventually([&] { return absl::Now() - start > absl::Milliseconds(5); }));
  server.gate().Open();
  done.WaitForNotification();
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.result().outcome(), v1::OUTCOME_KEPT_FULL);
  EXPECT_EQ(response.result().reason(), v1::REASON_DEADLINE);
}

TEST(Compress, DeadlineOfTheCallEndsItWhileItWaits) {
  TestServer server("num_workers: 1");
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  server.gate().Close();
  WorkerStream busy(server);
  busy.Begin(1, request.spec());
  busy.Layer(1, request.layers(0));
  ASSERT_TRUE(server.gate().AwaitWaiting(1));
  const auto stub = server.compression();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  v1::CompressResponse response;
  EXPECT_EQ(stub->Compress(&context, request, &response).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  // Its end does not wait for the worker.
  EXPECT_TRUE(server.log().AwaitLine({"operation", "method=Compress", "reason=DEADLINE_EXCEEDED"}))
      << server.log().text();
  EXPECT_EQ(server.server().operations_running(), 1);
}

TEST(Compress, FullQueueIsRefusedWithARetryHint) {
  TestServer server("limits { queue_capacity: 1 } num_workers: 1");
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  server.gate().Close();
  const auto stub = server.compression();
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<v1::CompressResponse> responses(2);
  absl::Mutex mutex;
  int done = 0;
  for (int i = 0; i < 2; ++i) {
    contexts.push_back(NewContext());
    stub->async()->Compress(contexts[i].get(), &request, &responses[i], [&](grpc::Status status) {
      EXPECT_TRUE(status.ok()) << status.error_message();
      absl::MutexLock lock(&mutex);
      ++done;
    });
    if (i == 0) {
      ASSERT_TRUE(server.gate().AwaitWaiting(1));
    }
  }
  ASSERT_TRUE(Eventually([&] { return server.server().operations_running() == 2; }));
  const auto context = NewContext();
  v1::CompressResponse response;
  const grpc::Status status = stub->Compress(context.get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("retry in ~"));
  EXPECT_EQ(context->GetServerTrailingMetadata().count("retry-after-ms"), 1);
  server.gate().Open();
  EXPECT_TRUE(Eventually([&] {
    absl::MutexLock lock(&mutex);
    return done == 2;
  }));
}

TEST(Compress, FullQueueShedsToKeptFullWhenConfigured) {
  TestServer server("limits { queue_capacity: 1 shed_to_kept_full: true } num_workers: 1");
  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request = WireRequest(prompt, "snapkv", kBudget);
  server.gate().Close();
  WorkerStream first(server);
  WorkerStream second(server);
  first.Begin(1, request.spec());
  first.Layer(1, request.layers(0));
  ASSERT_TRUE(server.gate().AwaitWaiting(1));
  second.Begin(1, request.spec());
  ASSERT_TRUE(Eventually([&] { return server.server().operations_running() == 2; }));
  v1::OperationResult result;
  const grpc::Status status = Compress(server, request, &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(result.outcome(), v1::OUTCOME_KEPT_FULL);
  EXPECT_EQ(result.reason(), v1::REASON_SHED);
  server.gate().Open();
}

TEST(Compress, OurOwnFaultReachesTheClientWithoutDetails) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  server.gate().FailWith(absl::InternalError("secret detail"));
  const grpc::Status status = Compress(server, WireRequest(prompt, "snapkv", kBudget), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_THAT(status.error_message(), HasSubstr("correlation id "));
  EXPECT_THAT(status.error_message(), ::testing::Not(HasSubstr("secret")));
  const std::string id = status.error_message().substr(status.error_message().rfind(' ') + 1);
  EXPECT_TRUE(server.log().AwaitLine({"error operation", "secret detail", id}));
}

TEST(Compress, WritesOneLogLineWithTheCallersIds) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const auto context = NewContext();
  context->AddMetadata("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
  v1::CompressResponse response;
  ASSERT_TRUE(server.compression()
                  ->Compress(context.get(), WireRequest(prompt, "tova", kBudget), &response)
                  .ok());
  EXPECT_TRUE(server.log().AwaitLine({"operation", "request_id=request-1", "policy=tova",
                                      "outcome=compressed", "reason=none", "transport=inline",
                                      "trace_id=0af7651916cd43dd8448eb211c80319c",
                                      "span_id=b7ad6b7169203331"}));
}

TEST(Compress, LeavesAnInvalidTraceContextOutOfTheLog) {
  for (const std::vector<const char*>& headers : std::vector<std::vector<const char*>>{
           {"00-00000000000000000000000000000000-b7ad6b7169203331-01"},
           {"not a trace"},
           {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}) {
    TestServer server;
    const fakes::SyntheticPrompt prompt({});
    const auto context = NewContext();
    for (const char* header : headers) context->AddMetadata("traceparent", header);
    v1::CompressResponse response;
    ASSERT_TRUE(server.compression()
                    ->Compress(context.get(), WireRequest(prompt, "tova", kBudget), &response)
                    .ok());
    ASSERT_TRUE(server.log().AwaitLine({"operation", "request_id=request-1"}));
    EXPECT_THAT(server.log().text(), ::testing::Not(HasSubstr("trace_id")));
  }
}

TEST(Compress, CountsTheOperationInTheMetrics) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  ASSERT_TRUE(Compress(server, WireRequest(prompt, "tova", kBudget), nullptr).ok());
  EXPECT_TRUE(Eventually([&] {
    return server.server().RenderMetrics().find(
               "keepset_compress_operations_total{outcome=\"compressed\",reason=\"none\"} 1") !=
           std::string::npos;
  })) << server.server().RenderMetrics();
}

}  // namespace
}  // namespace keepset::integration
