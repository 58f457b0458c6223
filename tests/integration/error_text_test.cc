// What an error may say: the caller's own values, never the server's insides or another session's.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/typed_worker.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint64_t kBudget = 24;

TEST(ErrorText, LongQuotesAreCutSoThatTheErrorArrives) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  const grpc::Status status =
      Compress(server, WireRequest(prompt, std::string(64 << 10, 'p'), kBudget), nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("unknown policy 'ppp"));
  EXPECT_LT(status.error_message().size(), 4096u);
}

TEST(ErrorText, AStreamsErrorCutsNoCharacter) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  WorkerStream stream(server);
  // Wherever the cut falls, it is within a character for one of two policies.
  for (const std::string first : {"", "p"}) {
    std::string policy = first;
    for (int i = 0; i < 2000; ++i) policy += "é";
    stream.Begin(1, WireSpec(prompt, policy, kBudget));
    const auto answer = stream.NextAnswer();
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->error().code(), grpc::StatusCode::NOT_FOUND);
    EXPECT_THAT(answer->error().message(), HasSubstr(first + "éé"));
  }
}

TEST(ErrorText, StatisticsHoldNoHalfCharacterOfAModelsName) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "best", kBudget);
  request.mutable_spec()->mutable_model()->set_architecture(std::string(127, 'a') + "é");
  EXPECT_FALSE(Compress(server, request, nullptr).ok());
  v1::GetStatisticsResponse response;
  const grpc::Status status =
      server.info()->GetStatistics(NewContext().get(), v1::GetStatisticsRequest(), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.operations(0).model(), std::string(127, 'a'));
}

TEST(ErrorText, StatisticsCallAPolicyThatIsNoneUnknown) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  for (const std::string policy : {"best", "better"}) {
    EXPECT_FALSE(Compress(server, WireRequest(prompt, policy, kBudget), nullptr).ok());
  }
  v1::GetStatisticsResponse response;
  const grpc::Status status =
      server.info()->GetStatistics(NewContext().get(), v1::GetStatisticsRequest(), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.operations_size(), 1);
  EXPECT_EQ(response.operations(0).policy(), "unknown");
  EXPECT_EQ(response.operations(0).outcomes(0).count(), 2u);
}

TEST(ErrorText, LongRequestIdIsRefused) {
  TestServer server;
  const fakes::SyntheticPrompt prompt({});
  v1::CompressRequest request = WireRequest(prompt, "tova", kBudget);
  request.mutable_spec()->set_request_id(std::string(257, 'r'));
  const grpc::Status status = Compress(server, request, nullptr);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "request_id: 257 bytes, want 0..256");
}

class ErrorTextLeaks : public ::testing::Test {
 protected:
  ErrorTextLeaks() {
    fakes::WriteAndRename(tables_ / "secret-file.safetensors",
                          TableFileFor(prompt_, "table", "1", 0.9f));
    server_ =
        std::make_unique<TestServer>(absl::StrCat("tables_directory: \"", tables_.path(), "\""));
    owner_ = std::make_unique<WorkerSession>(*server_);
    asker_ = std::make_unique<WorkerSession>(*server_);
    region_ = owner_->Register("name-of-another", 1 << 20, v1::REGION_ACCESS_READ_ONLY);
  }

  v1::RegisterRegionRequest Registration(const std::string& kind) const {
    v1::RegisterRegionRequest request;
    request.set_session_id(asker_->id());
    request.set_name("name-of-another");
    request.set_kind(kind);
    request.set_allocation_bytes(4096);
    request.set_length(4096);
    request.set_access(v1::REGION_ACCESS_READ_ONLY);
    return request;
  }
  std::string TextOf(const v1::RegisterRegionRequest& request) {
    v1::RegisterRegionResponse response;
    const grpc::Status status =
        asker_->stub().RegisterRegion(NewContext().get(), request, &response);
    EXPECT_FALSE(status.ok());
    return status.error_message();
  }
  std::string TextOf(const v1::CompressRequest& request) {
    const grpc::Status status = Compress(*server_, request, nullptr);
    EXPECT_FALSE(status.ok());
    return status.error_message();
  }

  void ExpectNoSecret(const std::string& text) {
    EXPECT_NE(text, "");
    const std::vector<std::string> secrets = {server_->directory(),
                                              tables_.path(),
                                              "secret-file",
                                              "name-of-another",
                                              owner_->id(),
                                              ".cc",
                                              "0x",
                                              "/proc",
                                              "/tmp",
                                              "terminate"};
    for (const std::string& secret : secrets) EXPECT_THAT(text, Not(HasSubstr(secret)));
  }

  const fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  const fakes::ScratchDirectory tables_;
  std::unique_ptr<TestServer> server_;
  std::unique_ptr<WorkerSession> owner_;
  std::unique_ptr<WorkerSession> asker_;
  WorkerSession::Region region_;
};

TEST_F(ErrorTextLeaks, OfRegionsAndSessions) {
  v1::CompressRequest request =
      ToRegion(WireRequest(prompt_, "tova", kBudget), asker_->id(), region_);
  ExpectNoSecret(TextOf(request));
  request.mutable_spec()->set_session_id("unknown");
  ExpectNoSecret(TextOf(request));
  const grpc::Status retired = asker_->Retire(region_.id, 1);
  EXPECT_EQ(retired.error_code(), grpc::StatusCode::NOT_FOUND);
  ExpectNoSecret(retired.error_message());
}

TEST_F(ErrorTextLeaks, OfAForeignRegionIsThatOfNoRegionAtAll) {
  const std::string foreign = asker_->Retire(region_.id, 1).error_message();
  EXPECT_EQ(foreign, asker_->Retire("no such region", 1).error_message());
}

TEST_F(ErrorTextLeaks, OfRegistrations) {
  ExpectNoSecret(TextOf(Registration("memfd")));
  ExpectNoSecret(TextOf(Registration("cuda_ipc")));
  v1::RegisterRegionRequest named = Registration("posix_shm");
  named.set_posix_name("/keepset-guess");
  ExpectNoSecret(TextOf(named));
  v1::RegisterRegionRequest token = Registration("memfd");
  token.set_fd_token(12345);
  ExpectNoSecret(TextOf(token));
  const service::UniqueFd unsealed(::memfd_create("unsealed", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(unsealed.get(), 4096), 0);
  token.set_fd_token(asker_->PassFd(unsealed.get()));
  ExpectNoSecret(TextOf(token));
}

TEST_F(ErrorTextLeaks, OfTables) {
  v1::CompressRequest request = WireRequest(prompt_, "compilerkv", kBudget);
  request.mutable_spec()->set_ppl(8.0);
  request.mutable_spec()->mutable_table()->set_name("other");
  ExpectNoSecret(TextOf(request));
  request.mutable_spec()->clear_table();
  request.mutable_spec()->mutable_model()->set_architecture("Other");
  ExpectNoSecret(TextOf(request));
}

TEST_F(ErrorTextLeaks, OfOurOwnFault) {
  server_->gate().FailWith(absl::DataLossError(absl::StrCat(tables_.path(), " at 0xdead")));
  const std::string text = TextOf(WireRequest(prompt_, "snapkv", kBudget));
  ExpectNoSecret(text);
  EXPECT_THAT(text, HasSubstr("correlation id"));
}

}  // namespace
}  // namespace keepset::integration
