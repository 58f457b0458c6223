// TableService of a whole server: who may write, what operations get, what watchers see.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "keepset/v1/table.grpc.pb.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/typed_worker.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using testing::HasSubstr;

constexpr uint64_t kBudget = 40;

class TableServiceTest : public testing::Test {
 protected:
  explicit TableServiceTest(const std::string& config = "table_writes: true") : server_(config) {}

  std::string FileOf(const std::string& version, float gate = 0.9f) const {
    return TableFileFor(prompt_, "a", version, gate);
  }
  v1::LoadTableResponse Load(const std::string& version, float gate = 0.9f) {
    v1::LoadTableRequest request;
    request.set_inline_(FileOf(version, gate));
    v1::LoadTableResponse response;
    const grpc::Status status = tables_->Load(NewContext().get(), request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  grpc::Status Activate(const std::string& version, v1::TableWriteResponse* response = nullptr) {
    v1::ActivateTableRequest request;
    request.mutable_table()->set_name("a");
    request.mutable_table()->set_version(version);
    request.set_actor("tester");
    v1::TableWriteResponse ignored;
    return tables_->Activate(NewContext().get(), request,
                             response == nullptr ? &ignored : response);
  }
  grpc::Status SetCanary(const std::string& version, double percent) {
    v1::SetCanaryRequest request;
    request.mutable_table()->set_name("a");
    request.mutable_table()->set_version(version);
    request.set_percent(percent);
    v1::TableWriteResponse response;
    return tables_->SetCanary(NewContext().get(), request, &response);
  }
  v1::CompressRequest Request(const std::string& request_id = "") const {
    v1::CompressRequest request = WireRequest(prompt_, "compilerkv", kBudget);
    request.mutable_spec()->set_ppl(10.0);
    request.mutable_spec()->set_request_id(request_id);
    return request;
  }
  v1::TableIdentity TableOf(const v1::CompressRequest& request) {
    v1::OperationResult result;
    const grpc::Status status = Compress(server_, request, &result);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return result.table();
  }

  const fakes::SyntheticPrompt prompt_{{.num_layers = 2}};
  TestServer server_;
  const std::unique_ptr<v1::TableService::Stub> tables_ =
      v1::TableService::NewStub(server_.NewChannel());
};

class ReadOnlyTableServiceTest : public TableServiceTest {
 protected:
  ReadOnlyTableServiceTest() : TableServiceTest("") {}
};

TEST_F(ReadOnlyTableServiceTest, RefusesEveryWriteAndLogsIt) {
  v1::LoadTableRequest load;
  load.set_inline_(FileOf("1"));
  load.set_actor("mallory");
  v1::LoadTableResponse loaded;
  EXPECT_EQ(tables_->Load(NewContext().get(), load, &loaded).error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
  v1::TableWriteResponse response;
  EXPECT_EQ(Activate("1").error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(SetCanary("1", 5).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(tables_->Rollback(NewContext().get(), {}, &response).error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(tables_->SetAlias(NewContext().get(), {}, &response).error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(tables_->Unload(NewContext().get(), {}, &response).error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_TRUE(server_.log().AwaitLine(
      {"table_write", "method=Load", "actor=mallory", "result=PERMISSION_DENIED"}));
}

TEST_F(ReadOnlyTableServiceTest, AnswersReads) {
  v1::ListTablesResponse list;
  ASSERT_TRUE(tables_->List(NewContext().get(), {}, &list).ok());
  EXPECT_FALSE(list.writable());
  EXPECT_EQ(list.authority(), "local");
  v1::ValidateTableRequest validate;
  validate.set_content(FileOf("1"));
  v1::ValidateTableResponse findings;
  ASSERT_TRUE(tables_->Validate(NewContext().get(), validate, &findings).ok());
  EXPECT_TRUE(findings.valid());
}

TEST_F(TableServiceTest, LoadsActivatesAndServesAnUpload) {
  const v1::LoadTableResponse loaded = Load("1");
  EXPECT_EQ(loaded.version().state(), v1::TABLE_STATE_READY);
  EXPECT_FALSE(loaded.durable());
  v1::OperationResult none;
  EXPECT_EQ(Compress(server_, Request(), &none).error_code(), grpc::StatusCode::NOT_FOUND);
  v1::TableWriteResponse activated;
  ASSERT_TRUE(Activate("1", &activated).ok());
  EXPECT_GT(activated.revision(), loaded.revision());
  EXPECT_FALSE(activated.durable());
  const v1::TableIdentity used = TableOf(Request());
  EXPECT_EQ(used.version(), "1");
  EXPECT_EQ(used.selection(), v1::TABLE_SELECTION_ACTIVE);
  EXPECT_EQ(used.digest(), loaded.version().digest());
  EXPECT_TRUE(server_.log().AwaitLine(
      {"table_write", "method=Activate", "peer=unix:", "actor=tester", "result=OK",
       absl::StrCat("revision=", activated.revision()), loaded.version().digest()}));
}

TEST_F(TableServiceTest, ListGroupsVersionsByLine) {
  Load("1");
  Load("2");
  ASSERT_TRUE(Activate("1").ok());
  v1::ListTablesResponse list;
  ASSERT_TRUE(tables_->List(NewContext().get(), {}, &list).ok());
  EXPECT_TRUE(list.writable());
  ASSERT_EQ(list.lines_size(), 1);
  EXPECT_EQ(list.lines(0).active_version(), "1");
  EXPECT_EQ(list.lines(0).mode(), v1::TABLE_LINE_MODE_CHOSEN);
  ASSERT_EQ(list.lines(0).versions_size(), 2);
  EXPECT_EQ(list.lines(0).versions(0).state(), v1::TABLE_STATE_ACTIVE);
  EXPECT_EQ(list.lines(0).versions(1).state(), v1::TABLE_STATE_READY);
  v1::ListTablesRequest other;
  other.set_architecture("another");
  list.Clear();
  ASSERT_TRUE(tables_->List(NewContext().get(), other, &list).ok());
  EXPECT_EQ(list.lines_size(), 0);
}

TEST_F(TableServiceTest, GetInspectsOneVersion) {
  Load("1");
  v1::GetTableRequest request;
  request.mutable_table()->set_name("a");
  request.mutable_table()->set_version("1");
  v1::GetTableResponse response;
  ASSERT_TRUE(tables_->Get(NewContext().get(), request, &response).ok());
  EXPECT_THAT(response.inspect_json(), HasSubstr("head_weights"));
  EXPECT_GT(response.version().bytes(), 0);
  request.mutable_table()->set_version("2");
  EXPECT_EQ(tables_->Get(NewContext().get(), request, &response).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(TableServiceTest, RollsBackInOneCall) {
  Load("1", 0.85f);
  Load("2", 0.95f);
  ASSERT_TRUE(Activate("1").ok());
  ASSERT_TRUE(Activate("2").ok());
  v1::RollbackTableRequest request;
  request.set_name("a");
  v1::TableWriteResponse response;
  ASSERT_TRUE(tables_->Rollback(NewContext().get(), request, &response).ok());
  EXPECT_EQ(response.previous_version(), "2");
  EXPECT_EQ(response.line().active_version(), "1");
  EXPECT_EQ(TableOf(Request()).version(), "1");
}

TEST_F(TableServiceTest, RefusesAStaleCompareAndSet) {
  Load("1");
  v1::ActivateTableRequest request;
  request.mutable_table()->set_name("a");
  request.mutable_table()->set_version("1");
  request.set_expected_revision(1);
  v1::TableWriteResponse response;
  EXPECT_EQ(tables_->Activate(NewContext().get(), request, &response).error_code(),
            grpc::StatusCode::ABORTED);
}

TEST_F(TableServiceTest, RefusesADamagedUploadNamingWhatIsWrong) {
  v1::LoadTableRequest request;
  request.set_inline_(FileOf("1").substr(0, 100));
  v1::LoadTableResponse response;
  const grpc::Status status = tables_->Load(NewContext().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("want"));
}

TEST_F(TableServiceTest, ARequestKeepsItsSideOfACanary) {
  Load("1", 0.85f);
  Load("2", 0.95f);
  ASSERT_TRUE(Activate("1").ok());
  ASSERT_TRUE(SetCanary("2", 50).ok());
  int canary = 0;
  for (int i = 0; i < 40; ++i) {
    const v1::CompressRequest request = Request(absl::StrCat("request-", i));
    const v1::TableIdentity first = TableOf(request);
    EXPECT_EQ(first.version(), TableOf(request).version());
    const bool is_canary = first.selection() == v1::TABLE_SELECTION_CANARY;
    EXPECT_EQ(first.version(), is_canary ? "2" : "1");
    canary += is_canary ? 1 : 0;
  }
  EXPECT_GT(canary, 0);
  EXPECT_LT(canary, 40);
  EXPECT_EQ(TableOf(Request()).version(), "1") << "a request without an id";
  ASSERT_TRUE(SetCanary("", 0).ok());
  EXPECT_EQ(TableOf(Request("request-0")).selection(), v1::TABLE_SELECTION_ACTIVE);
}

TEST_F(TableServiceTest, RefusesAPercentageThatIsNone) {
  Load("1");
  Load("2");
  ASSERT_TRUE(Activate("1").ok());
  for (const double percent : {-1.0, 100.5, 0.001, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_EQ(SetCanary("2", percent).error_code(), grpc::StatusCode::INVALID_ARGUMENT) << percent;
  }
}

TEST_F(TableServiceTest, PinsBeatTheCanaryAndSayHow) {
  Load("1", 0.85f);
  const std::string digest = Load("2", 0.95f).version().digest();
  ASSERT_TRUE(Activate("1").ok());
  ASSERT_TRUE(SetCanary("2", 100).ok());
  v1::CompressRequest request = Request("any");
  request.mutable_spec()->mutable_table()->set_alias("stable");
  v1::TableIdentity used = TableOf(request);
  EXPECT_EQ(used.version(), "1");
  EXPECT_EQ(used.selection(), v1::TABLE_SELECTION_PINNED);
  EXPECT_EQ(used.alias(), "stable");
  request.mutable_spec()->mutable_table()->clear_alias();
  request.mutable_spec()->mutable_table()->set_digest(digest);
  used = TableOf(request);
  EXPECT_EQ(used.version(), "2");
  EXPECT_EQ(used.selection(), v1::TABLE_SELECTION_PINNED);
}

TEST_F(TableServiceTest, ASessionsPinHoldsForItsOperations) {
  Load("1", 0.85f);
  Load("2", 0.95f);
  ASSERT_TRUE(Activate("1").ok());
  const auto sessions = server_.sessions();
  v1::OpenSessionRequest open;
  open.set_client_uuid(std::string(16, 'u'));
  open.mutable_table()->set_name("a");
  open.mutable_table()->set_version("2");
  v1::OpenSessionResponse session;
  ASSERT_TRUE(sessions->OpenSession(NewContext().get(), open, &session).ok());
  v1::CompressRequest request = Request();
  request.mutable_spec()->set_session_id(session.session_id());
  v1::TableIdentity used = TableOf(request);
  EXPECT_EQ(used.version(), "2");
  EXPECT_EQ(used.selection(), v1::TABLE_SELECTION_SESSION);
  request.mutable_spec()->mutable_table()->set_version("1");
  used = TableOf(request);
  EXPECT_EQ(used.version(), "1");
  EXPECT_EQ(used.selection(), v1::TABLE_SELECTION_PINNED);
}

TEST_F(TableServiceTest, ASessionCannotPinWhatIsNotLoaded) {
  Load("1");
  v1::OpenSessionRequest open;
  open.set_client_uuid(std::string(16, 'u'));
  open.mutable_table()->set_version("7");
  v1::OpenSessionResponse session;
  const grpc::Status status = server_.sessions()->OpenSession(NewContext().get(), open, &session);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("a@1"));
}

TEST_F(TableServiceTest, ALooseMatchIsInEveryReply) {
  Load("1");
  ASSERT_TRUE(Activate("1").ok());
  v1::CompressRequest request = Request();
  request.mutable_spec()->mutable_model()->set_architecture("AnotherForCausalLM");
  v1::OperationResult result;
  EXPECT_EQ(Compress(server_, request, &result).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  (*request.mutable_spec()->mutable_parameters())["fingerprint_match"] = "shape";
  ASSERT_TRUE(Compress(server_, request, &result).ok());
  EXPECT_TRUE(result.table().loose_match());
  ASSERT_GE(result.relaxed_size(), 1);
  EXPECT_THAT(result.relaxed(0), HasSubstr("architecture"));
  EXPECT_FALSE(TableOf(Request()).loose_match());
}

TEST_F(TableServiceTest, ValidateFindsWhatLoadWouldRefuse) {
  Load("1", 0.85f);
  v1::ValidateTableRequest request;
  request.set_content(FileOf("1", 0.95f));
  v1::ValidateTableResponse response;
  ASSERT_TRUE(tables_->Validate(NewContext().get(), request, &response).ok());
  EXPECT_FALSE(response.valid());
  EXPECT_EQ(response.findings(0).severity(), v1::TableFinding::SEVERITY_ERROR);
  request.set_content("no table");
  response.Clear();
  ASSERT_TRUE(tables_->Validate(NewContext().get(), request, &response).ok());
  EXPECT_FALSE(response.valid());
  EXPECT_FALSE(response.has_version());
}

TEST_F(TableServiceTest, WatchStreamsTheStateAndThenChangesInOrder) {
  Load("1");
  const auto context = NewContext();
  const auto stream = tables_->Watch(context.get(), {});
  v1::WatchTablesResponse message;
  ASSERT_TRUE(stream->Read(&message));
  EXPECT_TRUE(message.complete());
  ASSERT_EQ(message.lines_size(), 1);
  uint64_t last = message.revision();
  for (const char* version : {"2", "3", "4"}) {
    Load(version);
    ASSERT_TRUE(stream->Read(&message));
    EXPECT_FALSE(message.complete());
    EXPECT_GT(message.revision(), last);
    last = message.revision();
  }
  EXPECT_EQ(message.lines(0).versions_size(), 4);
  context->TryCancel();
  while (stream->Read(&message)) {
  }
}

TEST_F(TableServiceTest, WatchEndsWhenTheVersionIsActive) {
  Load("1");
  v1::WatchTablesRequest request;
  request.mutable_until_active()->set_name("a");
  request.mutable_until_active()->set_version("1");
  const auto context = NewContext();
  const auto stream = tables_->Watch(context.get(), request);
  v1::WatchTablesResponse message;
  ASSERT_TRUE(stream->Read(&message));
  ASSERT_TRUE(Activate("1").ok());
  while (stream->Read(&message)) {
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(message.lines(0).active_version(), "1");
}

TEST_F(TableServiceTest, WatchOfOneLineIsNotWokenByOthers) {
  Load("1");
  v1::WatchTablesRequest request;
  request.set_name("a");
  const auto context = NewContext();
  const auto stream = tables_->Watch(context.get(), request);
  v1::WatchTablesResponse message;
  ASSERT_TRUE(stream->Read(&message));
  v1::LoadTableRequest other;
  other.set_inline_(TableFileFor(prompt_, "b", "1", 0.9f));
  v1::LoadTableResponse loaded;
  ASSERT_TRUE(tables_->Load(NewContext().get(), other, &loaded).ok());
  Load("2");
  ASSERT_TRUE(stream->Read(&message));
  ASSERT_EQ(message.lines_size(), 1);
  EXPECT_EQ(message.lines(0).name(), "a");
  context->TryCancel();
}

TEST_F(TableServiceTest, WatchEndsWithTheServer) {
  const auto context = NewContext();
  const auto stream = tables_->Watch(context.get(), {});
  v1::WatchTablesResponse message;
  ASSERT_TRUE(stream->Read(&message));
  server_.Stop();
  while (stream->Read(&message)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(TableServiceTest, HealthNamesModelsWithAnActiveTable) {
  const std::string model = WireSpec(prompt_, "compilerkv", kBudget).model().architecture();
  Load("1");
  EXPECT_NE(server_.Health(model), 1);
  ASSERT_TRUE(Activate("1").ok());
  EXPECT_EQ(server_.Health(model), 1);
}

class SmallUploadsTest : public TableServiceTest {
 protected:
  SmallUploadsTest() : TableServiceTest("table_writes: true limits { max_table_bytes: 1024 }") {}
};

TEST_F(SmallUploadsTest, AnUploadAboveTheCapIsRefused) {
  v1::LoadTableRequest request;
  request.set_inline_(std::string(1025, 'x'));
  v1::LoadTableResponse response;
  const grpc::Status status = tables_->Load(NewContext().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("1024"));
}

TEST(TableServiceRestart, RecoversWhatWasActiveFromItsStateDirectory) {
  const fakes::SyntheticPrompt prompt({.num_layers = 2});
  const TempDir kept;
  const std::string config =
      absl::StrCat("table_writes: true state_directory: \"", kept.path(), "/state\"");
  v1::CompressRequest request = WireRequest(prompt, "compilerkv", kBudget);
  request.mutable_spec()->set_ppl(10.0);
  {
    TestServer server(config);
    const auto tables = v1::TableService::NewStub(server.NewChannel());
    v1::LoadTableRequest load;
    load.set_inline_(TableFileFor(prompt, "a", "1", 0.9f));
    v1::LoadTableResponse loaded;
    ASSERT_TRUE(tables->Load(NewContext().get(), load, &loaded).ok());
    EXPECT_TRUE(loaded.durable());
    v1::ActivateTableRequest activate;
    activate.mutable_table()->set_digest(loaded.version().digest());
    v1::TableWriteResponse activated;
    ASSERT_TRUE(tables->Activate(NewContext().get(), activate, &activated).ok());
    EXPECT_TRUE(activated.durable());
  }
  TestServer server(config);
  v1::OperationResult result;
  const grpc::Status status = Compress(server, request, &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(result.table().version(), "1");
}

TEST_F(TableServiceTest, ALongActorIsCutBetweenTwoCharacters) {
  Load("1");
  v1::ActivateTableRequest request;
  request.mutable_table()->set_name("a");
  request.mutable_table()->set_version("1");
  request.set_actor(std::string(127, 'a') + "é");
  v1::TableWriteResponse response;
  const grpc::Status status = tables_->Activate(NewContext().get(), request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.line().history(0).actor(), std::string(127, 'a'));
}

TEST(TableServiceDirectory, AFileNameThatIsNoTextIsListed) {
  const fakes::SyntheticPrompt prompt({.num_layers = 2});
  const fakes::ScratchDirectory directory;
  fakes::WriteInPlace(directory / "x\xff.safetensors", TableFileFor(prompt, "a", "1", 0.9f));
  fakes::WriteInPlace(directory / "y\xff.safetensors", "no table");
  TestServer server(absl::StrCat("tables_directory: \"", directory.path(), "\""));
  const auto tables = v1::TableService::NewStub(server.NewChannel());
  v1::ListTablesResponse response;
  const grpc::Status status = tables->List(NewContext().get(), v1::ListTablesRequest(), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.lines_size(), 1);
  EXPECT_EQ(response.lines(0).versions(0).origin(), "x\\xff.safetensors");
  ASSERT_EQ(response.nameless_size(), 1);
  EXPECT_THAT(response.nameless(0).reason(), HasSubstr("y\\xff.safetensors"));
}

TEST(TableServicePath, LoadsAFileOfTheTablesDirectoryAndNoOther) {
  const fakes::SyntheticPrompt prompt({.num_layers = 2});
  const fakes::ScratchDirectory directory;
  // Not a name the directory's watcher takes.
  fakes::WriteInPlace(directory / "staged.table", TableFileFor(prompt, "a", "1", 0.9f));
  TestServer server(
      absl::StrCat("table_writes: true tables_directory: \"", directory.path(), "\""));
  const auto tables = v1::TableService::NewStub(server.NewChannel());
  v1::LoadTableRequest request;
  request.set_path("staged.table");
  v1::LoadTableResponse response;
  const grpc::Status status = tables->Load(NewContext().get(), request, &response);
  if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED) GTEST_SKIP() << "no openat2";
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.version().origin(), "staged.table");
  request.set_path("/etc/passwd");
  EXPECT_EQ(tables->Load(NewContext().get(), request, &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

}  // namespace
}  // namespace keepset::integration
