// A worker asks what the active observation_heads table reads, and sends that alone.
#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "keepset/v1/table.grpc.pb.h"
#include "nlohmann/json.hpp"
#include "tables/observation_heads_table.h"
#include "tables/table_file.h"
#include "tables/table_store.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using tables::ObservedRows;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;

std::string TableBytes(const tables::ModelFingerprint& model, const std::string& version,
                       float weight) {
  tables::ObservationHeadsContent content;
  content.name = "heads";
  content.version = version;
  content.model = model;
  content.observations = {{1, 3, ObservedRows::kMaxRows, 1.0f},
                          {1, 0, ObservedRows::kKeyNovelty, weight}};
  content.settings.risk_curve = {{0.0, 0.0}, {1.0, 1.0}};
  content.provenance_json = R"({"source": "hand-written"})";
  const absl::StatusOr<std::string> bytes = tables::SerializeTable(content);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return *bytes;
}

class ObservationHeadsServed : public ::testing::Test {
 protected:
  ObservationHeadsServed() {
    fakes::WriteAndRename(tables_ / "heads.safetensors", TableBytes(prompt_.model(), "1", 0.5f));
    server_ =
        std::make_unique<TestServer>(absl::StrCat("tables_directory: \"", tables_.path(), "\""));
  }

  grpc::Status Ask(const v1::OperationSpec& spec, v1::GetRequirementsResponse& response) {
    const auto stub = server_->compression();
    const std::unique_ptr<grpc::ClientContext> context = NewContext();
    v1::GetRequirementsRequest request;
    *request.mutable_spec() = spec;
    return stub->GetRequirements(context.get(), request, &response);
  }

  const fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  const fakes::ScratchDirectory tables_;
  std::unique_ptr<TestServer> server_;
};

TEST_F(ObservationHeadsServed, TheServerSaysWhatToSend) {
  v1::GetRequirementsResponse needs;
  const grpc::Status status = Ask(WireSpec(prompt_, "observation_heads", kBudget), needs);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(needs.layers_size(), 1);
  EXPECT_EQ(needs.layers(0).layer(), 1u);
  EXPECT_THAT(needs.layers(0).qo_heads(), ElementsAre(3));
  EXPECT_THAT(needs.layers(0).kv_heads(), ElementsAre(0, 1));
  EXPECT_TRUE(needs.observed_rows() && !needs.last_row() && !needs.probe_rows());
  EXPECT_EQ(needs.table().name(), "heads");
}

TEST_F(ObservationHeadsServed, OneLayerIsEnoughForAnAnswer) {
  v1::CompressRequest request = WireRequest(prompt_, "observation_heads", kBudget);
  v1::OperationResult whole;
  ASSERT_TRUE(Compress(*server_, request, &whole).ok());
  request.mutable_layers()->DeleteSubrange(2, 1);
  request.mutable_layers()->DeleteSubrange(0, 1);
  v1::OperationResult part;
  const grpc::Status status = Compress(*server_, request, &part);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(part.layers_size(), 3);
  for (int l = 0; l < 3; ++l) {
    EXPECT_EQ(part.layers(l).sets(0).indices(), whole.layers(0).sets(0).indices()) << l;
  }
  EXPECT_EQ(part.scope(), v1::SCOPE_SEQUENCE);
  EXPECT_TRUE(part.has_predicted_miss_rate());
}

TEST_F(ObservationHeadsServed, OneHeadsQueriesAreEnoughForAnAnswer) {
  v1::CompressRequest request = WireRequest(prompt_, "observation_heads", kBudget);
  v1::OperationResult whole;
  ASSERT_TRUE(Compress(*server_, request, &whole).ok());
  v1::LayerInput* const layer = request.mutable_layers(1);
  std::string* const queries = layer->mutable_q_window()->mutable_data()->mutable_inline_();
  const size_t head_bytes = queries->size() / prompt_.shape().num_qo_heads;
  *queries = queries->substr(3 * head_bytes, head_bytes);
  layer->add_qo_heads(3);
  v1::OperationResult part;
  const grpc::Status status = Compress(*server_, request, &part);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(part.layers(0).sets(0).indices(), whole.layers(0).sets(0).indices());
  layer->set_qo_heads(0, 2);
  const grpc::Status other = Compress(*server_, request, nullptr);
  EXPECT_EQ(other.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(other.error_message(), HasSubstr("layer 1: qo_heads has no head 3"));
  for (int i = 0; i < 100; ++i) layer->add_qo_heads(3);
  EXPECT_THAT(Compress(*server_, request, nullptr).error_message(),
              HasSubstr("layer 1: qo_heads: 101 heads, want at most 4"));
}

TEST_F(ObservationHeadsServed, OneLayerIsEnoughOnAStream) {
  WorkerStream stream(*server_);
  stream.Begin(1, WireSpec(prompt_, "observation_heads", kBudget));
  stream.Layer(1, WireLayer(prompt_, 1));
  stream.End(1);
  const auto answer = stream.NextAnswer();
  ASSERT_TRUE(answer.has_value() && answer->has_result());
  EXPECT_EQ(answer->result().layers_size(), 3);
}

TEST_F(ObservationHeadsServed, ALayerThatObservesMustBeSent) {
  v1::CompressRequest request = WireRequest(prompt_, "observation_heads", kBudget);
  request.mutable_layers()->DeleteSubrange(1, 2);
  const grpc::Status status = Compress(*server_, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("layer 1: not observed"));
}

TEST_F(ObservationHeadsServed, GatheringNeedsEveryLayer) {
  v1::CompressRequest request = WireRequest(prompt_, "observation_heads", kBudget);
  request.mutable_spec()->set_gather(v1::GATHER_INLINE);
  v1::OperationResult result;
  ASSERT_TRUE(Compress(*server_, request, &result).ok());
  EXPECT_TRUE(result.gathered());
  request.mutable_layers()->DeleteSubrange(2, 1);
  grpc::Status status = Compress(*server_, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("layer 2: was not sent, gathering needs"));
  request.mutable_layers()->DeleteSubrange(0, 1);
  status = Compress(*server_, request, nullptr);
  EXPECT_THAT(status.error_message(), HasSubstr("layer 0: was not sent"));
}

TEST_F(ObservationHeadsServed, AReloadedTableServesTheNextOperation) {
  fakes::WriteAndRename(tables_ / "heads.safetensors", TableBytes(prompt_.model(), "2", 2.0f));
  const v1::CompressRequest request = WireRequest(prompt_, "observation_heads", kBudget);
  v1::OperationResult result;
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  while (result.table().version() != "2" && absl::Now() < deadline) {
    ASSERT_TRUE(Compress(*server_, request, &result).ok());
  }
  EXPECT_EQ(result.table().version(), "2");
}

TEST_F(ObservationHeadsServed, ATableSaysWhichHeadsObserve) {
  const auto tables = v1::TableService::NewStub(server_->NewChannel());
  v1::GetTableRequest request;
  request.mutable_table()->set_name("heads");
  request.mutable_table()->set_version("1");
  v1::GetTableResponse response;
  const grpc::Status status = tables->Get(NewContext().get(), request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  const auto document = nlohmann::json::parse(response.inspect_json());
  const auto& observations = document["observations"];
  ASSERT_EQ(observations.size(), 2u);
  EXPECT_EQ(observations[0]["layer"], 1);
  EXPECT_EQ(observations[0]["head"], 3);
  EXPECT_EQ(observations[0]["rows"], "max_rows");
}

TEST_F(ObservationHeadsServed, ATableSaysWhatToSend) {
  const auto tables = v1::TableService::NewStub(server_->NewChannel());
  v1::GetTableRequest request;
  request.mutable_table()->set_name("heads");
  request.mutable_table()->set_version("1");
  v1::GetTableResponse response;
  const grpc::Status status = tables->Get(NewContext().get(), request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  v1::GetRequirementsResponse needs;
  ASSERT_TRUE(Ask(WireSpec(prompt_, "observation_heads", kBudget), needs).ok());
  ASSERT_EQ(response.requirements().layers_size(), 1);
  EXPECT_EQ(response.requirements().SerializeAsString(), needs.SerializeAsString());
}

TEST(ObservationHeadsCanary, ARequestKeepsItsSide) {
  const fakes::SyntheticPrompt prompt{fakes::PromptShape{}};
  TestServer server("table_writes: true");
  const auto tables = v1::TableService::NewStub(server.NewChannel());
  for (const char* version : {"1", "2"}) {
    v1::LoadTableRequest load;
    load.set_inline_(TableBytes(prompt.model(), version, 0.5f));
    v1::LoadTableResponse loaded;
    ASSERT_TRUE(tables->Load(NewContext().get(), load, &loaded).ok());
  }
  v1::TableWriteResponse written;
  v1::ActivateTableRequest activate;
  activate.mutable_table()->set_name("heads");
  activate.mutable_table()->set_version("1");
  ASSERT_TRUE(tables->Activate(NewContext().get(), activate, &written).ok());
  v1::SetCanaryRequest canary;
  canary.mutable_table()->set_name("heads");
  canary.mutable_table()->set_version("2");
  canary.set_percent(50);
  ASSERT_TRUE(tables->SetCanary(NewContext().get(), canary, &written).ok());
  std::set<std::string> versions;
  for (int id = 0; id < 40; ++id) {
    v1::CompressRequest request = WireRequest(prompt, "observation_heads", kBudget);
    request.mutable_spec()->set_request_id(absl::StrCat("request-", id));
    v1::OperationResult first;
    v1::OperationResult again;
    ASSERT_TRUE(Compress(server, request, &first).ok());
    ASSERT_TRUE(Compress(server, request, &again).ok());
    EXPECT_EQ(first.table().version(), again.table().version());
    versions.insert(first.table().version());
  }
  EXPECT_THAT(versions, ElementsAre("1", "2"));
}

TEST_F(ObservationHeadsServed, ACanaryTakesItsShareByTheHashOfTheRequest) {
  constexpr int kRequests = 200;
  constexpr double kPercent = 25;
  fakes::WriteAndRename(tables_ / "old.safetensors", TableBytes(prompt_.model(), "0", 2.0f));
  TestServer server(absl::StrCat("table_writes: true tables_directory: \"", tables_.path(), "\""));
  const auto tables = v1::TableService::NewStub(server.NewChannel());
  v1::SetCanaryRequest wish;
  wish.mutable_table()->set_name("heads");
  wish.mutable_table()->set_version("0");
  wish.set_percent(kPercent);
  wish.set_salt("salt");
  v1::TableWriteResponse written;
  const grpc::Status set = tables->SetCanary(NewContext().get(), wish, &written);
  ASSERT_TRUE(set.ok()) << set.error_message();

  const auto answered_by = [&](const std::string& id) {
    v1::CompressRequest request = WireRequest(prompt_, "observation_heads", kBudget);
    request.mutable_spec()->set_request_id(id);
    v1::OperationResult result;
    EXPECT_TRUE(Compress(server, request, &result).ok());
    return result.table().version();
  };
  int on_canary = 0;
  for (int i = 0; i < kRequests; ++i) {
    const std::string id = absl::StrCat("request-", i);
    const bool is_canary = tables::CanaryBucket("salt", id) < 100 * kPercent;
    EXPECT_EQ(answered_by(id), is_canary ? "0" : "1") << id;
    on_canary += is_canary ? 1 : 0;
  }
  EXPECT_GT(on_canary, 0);
  EXPECT_LT(on_canary, kRequests);
  EXPECT_EQ(answered_by(""), "1");
}

TEST_F(ObservationHeadsServed, ACanaryAnswersWhatARequestNeedsOnItsSide) {
  fakes::WriteAndRename(tables_ / "old.safetensors", TableBytes(prompt_.model(), "0", 2.0f));
  TestServer server(absl::StrCat("table_writes: true tables_directory: \"", tables_.path(), "\""));
  const auto tables = v1::TableService::NewStub(server.NewChannel());
  v1::SetCanaryRequest wish;
  wish.mutable_table()->set_name("heads");
  wish.mutable_table()->set_version("0");
  wish.set_percent(100);
  v1::TableWriteResponse written;
  ASSERT_TRUE(tables->SetCanary(NewContext().get(), wish, &written).ok());
  v1::GetRequirementsRequest request;
  *request.mutable_spec() = WireSpec(prompt_, "observation_heads", kBudget);
  request.mutable_spec()->set_request_id("request");
  v1::GetRequirementsResponse needs;
  ASSERT_TRUE(server.compression()->GetRequirements(NewContext().get(), request, &needs).ok());
  EXPECT_EQ(needs.table().version(), "0");
}

TEST_F(ObservationHeadsServed, AnotherModelsTableDoesNotFit) {
  v1::OperationSpec spec = WireSpec(prompt_, "observation_heads", kBudget);
  spec.mutable_model()->set_num_qo_heads(8);
  v1::GetRequirementsResponse needs;
  EXPECT_EQ(Ask(spec, needs).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(ObservationHeadsServed, WithoutItsTableThePolicyIsNotFound) {
  TestServer bare;
  const grpc::Status status =
      Compress(bare, WireRequest(prompt_, "observation_heads", kBudget), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ObservationHeadsServed, AnUnknownPolicyHasNoRequirements) {
  v1::GetRequirementsResponse needs;
  EXPECT_EQ(Ask(WireSpec(prompt_, "nothing", kBudget), needs).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

}  // namespace
}  // namespace keepset::integration
