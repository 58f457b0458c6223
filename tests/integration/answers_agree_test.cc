// One prompt, every way in: the library, a unary call, a stream, tensors inside the message or in
// shared memory. Keep sets and gathered rows are the same.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/operation.h"
#include "engine/policies/policy_registry.h"
#include "tables/table_file.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/typed_worker.h"

namespace keepset::integration {
namespace {

constexpr int64_t kBudget = 20;

// Of every layer and KV head: kept positions and the bytes of the rows gathered for them.
struct HeadAnswer {
  std::vector<int32_t> positions;
  std::string k_rows;
  std::string v_rows;
  bool operator==(const HeadAnswer&) const = default;
};
struct Answer {
  std::string outcome;
  std::string reason;
  int64_t bytes_after = 0;
  std::vector<HeadAnswer> heads;  // [L x Hkv]
  bool operator==(const Answer&) const = default;
};

enum class Path { kUnaryInline, kUnaryMemfd, kStreamInline, kStreamMemfd };

using Case = std::tuple<std::string, engine::Scope, fakes::KvLayout>;

std::string CaseName(const ::testing::TestParamInfo<Case>& info) {
  std::string name;
  for (const std::string& word :
       {std::get<0>(info.param), std::string(engine::ScopeName(std::get<1>(info.param)))}) {
    bool upper = true;
    for (const char c : word) {
      if (c != '_') name += upper ? static_cast<char>(std::toupper(c)) : c;
      upper = c == '_';
    }
  }
  return name + (std::get<2>(info.param) == fakes::KvLayout::kPaged ? "PagedBf16" : "HndF32");
}

class AnswersAgree : public ::testing::TestWithParam<Case> {
 protected:
  AnswersAgree()
      : prompt_({.num_layers = 2,
                 .dtype = paged() ? kernels::DType::kBF16 : kernels::DType::kF32,
                 .layout = std::get<2>(GetParam())}),
        table_(TableFileFor(prompt_, "agree", "1", 0.9f)) {
    fakes::WriteAndRename(tables_ / "agree.safetensors", table_);
    server_ =
        std::make_unique<TestServer>(absl::StrCat("tables_directory: \"", tables_.path(), "\""));
  }

  static bool paged() { return std::get<2>(GetParam()) == fakes::KvLayout::kPaged; }
  int64_t row_bytes() const { return prompt_.shape().head_dim * (paged() ? 2 : 4); }
  bool is_kv_head() const { return std::get<1>(GetParam()) == engine::Scope::kKvHead; }

  Answer OfLibrary() const;
  Answer OfService(Path path) const;

  const fakes::SyntheticPrompt prompt_;
  const std::string table_;
  const fakes::ScratchDirectory tables_;
  std::unique_ptr<TestServer> server_;
};

Answer AnswersAgree::OfLibrary() const {
  engine::OperationSpec spec = prompt_.spec();
  spec.policy = std::get<0>(GetParam());
  spec.scope = std::get<1>(GetParam());
  spec.budget.kind = engine::Budget::Kind::kTokens;
  spec.budget.tokens = kBudget;
  spec.ppl = 10.0;
  auto table = tables::ParseTable(
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(table_.data()), table_.size()),
      "agree");
  EXPECT_TRUE(table.ok()) << table.status();
  spec.table = *std::move(table);
  engine::Bench bench;
  auto operation = bench.Begin(spec);
  EXPECT_TRUE(operation.ok()) << operation.status();
  for (int64_t layer = 0; layer < prompt_.shape().num_layers; ++layer) {
    const absl::Status observed = (*operation)->Observe(layer, prompt_.observation(layer));
    EXPECT_TRUE(observed.ok()) << observed;
  }
  const auto result = (*operation)->Finish();
  EXPECT_TRUE(result.ok()) << result.status();
  Answer answer;
  answer.outcome = std::string(engine::OutcomeName((*result)->outcome));
  answer.reason = std::string(engine::ReasonName((*result)->reason));
  answer.bytes_after = (*result)->bytes_after;
  for (int64_t layer = 0; layer < prompt_.shape().num_layers; ++layer) {
    const engine::LayerObservation source = prompt_.observation(layer);
    const int64_t rows = *(*operation)->GatherRows(layer);
    std::string k(prompt_.shape().num_kv_heads * rows * row_bytes(), '\0');
    std::string v = k;
    const auto view = [&](std::string& bytes) {
      kernels::MutableKvView out;
      out.data = reinterpret_cast<std::byte*>(bytes.data());
      out.size_bytes = static_cast<int64_t>(bytes.size());
      out.dtype = source.k.dtype;
      out.num_kv_heads = prompt_.shape().num_kv_heads;
      out.seq_len = rows;
      out.head_dim = prompt_.shape().head_dim;
      out.token_stride = out.head_dim;
      out.head_stride = rows * out.head_dim;
      return out;
    };
    const absl::Status gathered = (*operation)->Gather(layer, source.k, source.v, view(k), view(v));
    EXPECT_TRUE(gathered.ok()) << gathered;
    for (int64_t g = 0; g < prompt_.shape().num_kv_heads; ++g) {
      const auto& sets = (*result)->layers[layer].keep_indices;
      HeadAnswer head;
      head.positions = sets[sets.size() == 1 ? 0 : g];
      const size_t used = head.positions.size() * row_bytes();
      head.k_rows = k.substr(g * rows * row_bytes(), used);
      head.v_rows = v.substr(g * rows * row_bytes(), used);
      answer.heads.push_back(std::move(head));
    }
  }
  return answer;
}

Answer AnswersAgree::OfService(Path path) const {
  const bool memfd = path == Path::kUnaryMemfd || path == Path::kStreamMemfd;
  const bool streamed = path == Path::kStreamInline || path == Path::kStreamMemfd;
  const auto region = *client::SharedRegion::Create("agree", 1 << 21);
  const auto client =
      ConnectTo(server_->address(), memfd ? client::Transport::kMemfd : client::Transport::kInline);
  if (client == nullptr) return {};
  client::OperationSpec spec = TypedSpec(prompt_, std::get<0>(GetParam()), kBudget);
  spec.scope = *client::ParseScope(engine::ScopeName(std::get<1>(GetParam())));
  spec.gather = memfd ? client::GatherMode::kDestination : client::GatherMode::kInline;
  std::vector<client::LayerInput> layers = TypedLayers(prompt_);
  if (memfd) {
    MoveInto(*region, layers);
    for (client::LayerInput& layer : layers) {
      client::Destination destination;
      destination.capacity_tokens = kBudget;
      for (client::KvTensor* tensor : {&destination.k, &destination.v}) {
        tensor->dtype = layer.k.dtype;
        tensor->size_bytes = prompt_.shape().num_kv_heads * kBudget * row_bytes();
        tensor->data = *region->Allocate(tensor->size_bytes);
      }
      layer.destination = destination;
    }
    const absl::Status registered =
        client->RegisterRegion(*region, "agree", client::RegionAccess::kReadWrite);
    EXPECT_TRUE(registered.ok()) << registered;
  }
  const auto result =
      streamed ? client->CompressStreamed(spec, layers) : client->CompressUnary(spec, layers);
  EXPECT_TRUE(result.ok()) << result.status();
  if (!result.ok()) return {};
  EXPECT_EQ(result->transport, memfd ? "memfd" : "inline");
  Answer answer;
  answer.outcome = std::string(client::OutcomeName(result->outcome));
  answer.reason = std::string(client::ReasonName(result->reason));
  answer.bytes_after = result->bytes_after;
  for (size_t layer = 0; layer < result->layers.size(); ++layer) {
    for (int64_t g = 0; g < prompt_.shape().num_kv_heads; ++g) {
      const client::LayerResult& from = result->layers[layer];
      HeadAnswer head;
      head.positions = from.sets[from.sets.size() == 1 ? 0 : g].keep_indices;
      if (!from.gathered.empty()) {
        const client::GatheredHead& rows = from.gathered[g];
        for (int64_t i = 0; i < rows.num_tokens; ++i) {
          head.k_rows.append(reinterpret_cast<const char*>(rows.k + i * rows.k_row_bytes),
                             row_bytes());
          head.v_rows.append(reinterpret_cast<const char*>(rows.v + i * rows.v_row_bytes),
                             row_bytes());
        }
      }
      answer.heads.push_back(std::move(head));
    }
  }
  return answer;
}

TEST_P(AnswersAgree, OverEveryPath) {
  Answer library = OfLibrary();
  ASSERT_FALSE(library.heads.empty());
  if (library.outcome == "kept_full") {
    // Nothing is moved: the worker's own cache is the answer.
    for (HeadAnswer& head : library.heads) head.k_rows = head.v_rows = "";
  } else {
    EXPECT_FALSE(library.heads[0].k_rows.empty());
  }
  for (const Path path :
       {Path::kUnaryInline, Path::kUnaryMemfd, Path::kStreamInline, Path::kStreamMemfd}) {
    EXPECT_TRUE(OfService(path) == library) << "path " << static_cast<int>(path);
  }
}

TEST(KeptFull, HandsOutNoRowsOfADestinationThatWasNotWritten) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const int64_t capacity = prompt.shape().seq_len;
  const auto region = *client::SharedRegion::Create("kept_full", 1 << 21);
  const auto client = ConnectTo(server.address(), client::Transport::kMemfd);
  client::OperationSpec spec = TypedSpec(prompt, "tova", capacity);
  spec.gather = client::GatherMode::kDestination;
  std::vector<client::LayerInput> layers = TypedLayers(prompt);
  MoveInto(*region, layers);
  for (client::LayerInput& layer : layers) {
    client::Destination destination;
    destination.capacity_tokens = capacity;
    for (client::KvTensor* tensor : {&destination.k, &destination.v}) {
      tensor->size_bytes = layer.k.size_bytes;
      tensor->data = *region->Allocate(tensor->size_bytes);
    }
    layer.destination = destination;
  }
  ASSERT_TRUE(client->RegisterRegion(*region, "kv", client::RegionAccess::kReadWrite).ok());
  const auto result = client->CompressUnary(spec, layers);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->reason, client::Reason::kBelowBudget);
  for (const client::LayerResult& layer : result->layers) EXPECT_TRUE(layer.gathered.empty());
}

// observation_heads wants a table of its own kind and other inputs; observation_heads_test.cc
// has its paths.
std::vector<std::string> PoliciesOfThesePrompts() {
  std::vector<std::string> names = engine::NewBuiltinPolicyRegistry()->Names();
  std::erase(names, "observation_heads");
  return names;
}

INSTANTIATE_TEST_SUITE_P(
    PoliciesAndScopes, AnswersAgree,
    ::testing::Combine(::testing::ValuesIn(PoliciesOfThesePrompts()),
                       ::testing::Values(engine::Scope::kLayerElastic, engine::Scope::kLayerEqual,
                                         engine::Scope::kSequence, engine::Scope::kKvHead),
                       ::testing::Values(fakes::KvLayout::kHnd, fakes::KvLayout::kPaged)),
    CaseName);

}  // namespace
}  // namespace keepset::integration
