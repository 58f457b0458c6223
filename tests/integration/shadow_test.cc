// A second table is asked beside the one that decides: in the reply when the request says so, in
// the metrics when the server does. The answer is the same either way.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/typed_worker.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kBudget = 24;

class ShadowTables : public ::testing::Test {
 protected:
  ShadowTables() {
    fakes::WriteAndRename(tables_ / "a.safetensors", TableFileFor(prompt_, "a", "1", 1.0f));
    fakes::WriteAndRename(tables_ / "b.safetensors", TableFileFor(prompt_, "b", "1", 0.8f));
  }
  void Start(const std::string& config) {
    server_ = std::make_unique<TestServer>(
        absl::StrCat("tables_directory: \"", tables_.path(), "\" ", config));
  }
  v1::CompressRequest Request() const {
    v1::CompressRequest request = WireRequest(prompt_, "compilerkv", kBudget);
    request.mutable_spec()->mutable_table()->set_name("a");
    request.mutable_spec()->set_ppl(10.0);
    return request;
  }
  v1::OperationResult Compress(const v1::CompressRequest& request) {
    v1::CompressResponse response;
    const grpc::Status status =
        server_->compression()->Compress(NewContext().get(), request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.result();
  }
  double Metric(const std::string& series) {
    const std::string page = server_->server().RenderMetrics();
    const size_t at = page.find("\n" + series + " ");
    return at == std::string::npos ? -1 : std::stod(page.substr(at + series.size() + 2));
  }
  static std::string Sets(const v1::OperationResult& result) {
    std::string sets;
    for (const v1::LayerResult& layer : result.layers()) sets += layer.SerializeAsString();
    return sets;
  }

  const fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  fakes::ScratchDirectory tables_;
  std::unique_ptr<TestServer> server_;
};

TEST_F(ShadowTables, AreReportedToTheRequestThatAsks) {
  Start("");
  const v1::OperationResult plain = Compress(Request());
  EXPECT_FALSE(plain.has_shadow());
  v1::CompressRequest request = Request();
  request.mutable_spec()->mutable_shadow_table()->set_name("b");
  const v1::OperationResult result = Compress(request);
  EXPECT_EQ(Sets(result), Sets(plain));
  ASSERT_TRUE(result.has_shadow());
  EXPECT_EQ(result.shadow().error(), "");
  EXPECT_EQ(result.shadow().table().name(), "b");
  EXPECT_GT(result.shadow().kept_overlap(), 0);
  EXPECT_LE(result.shadow().kept_overlap(), 1);

  v1::CompressRequest other = Request();
  other.mutable_spec()->mutable_table()->set_name("b");
  EXPECT_EQ(result.shadow().would_be_bytes(), Compress(other).bytes_after());
  EXPECT_EQ(Metric("keepset_shadow_operations_total{result=\"scored\"}"), 1);
  EXPECT_EQ(Metric("keepset_shadow_decided_bytes_total"), plain.bytes_after());
}

TEST_F(ShadowTables, ThatAreNotThereFailBesideTheAnswer) {
  Start("");
  const v1::OperationResult plain = Compress(Request());
  v1::CompressRequest request = Request();
  request.mutable_spec()->mutable_shadow_table()->set_name("nobody");
  const v1::OperationResult result = Compress(request);
  EXPECT_EQ(Sets(result), Sets(plain));
  EXPECT_THAT(result.shadow().error(), HasSubstr("nobody"));
  EXPECT_EQ(Metric("keepset_shadow_operations_total{result=\"failed\"}"), 1);
  EXPECT_TRUE(server_->log().AwaitLine({"shadow_failed", "nobody"}));
}

TEST_F(ShadowTables, OfAPolicyWithoutTablesFailBesideTheAnswer) {
  Start("");
  v1::CompressRequest request = WireRequest(prompt_, "snapkv", kBudget);
  request.mutable_spec()->mutable_shadow_table()->set_name("b");
  const v1::OperationResult result = Compress(request);
  EXPECT_EQ(result.outcome(), v1::OUTCOME_COMPRESSED);
  EXPECT_THAT(result.shadow().error(), HasSubstr("snapkv"));
}

TEST_F(ShadowTables, HaveNothingToSayAboutShortPrompts) {
  Start("");
  v1::CompressRequest request = Request();
  request.mutable_spec()->mutable_budget()->set_tokens(prompt_.shape().seq_len);
  request.mutable_spec()->mutable_shadow_table()->set_name("b");
  EXPECT_NE(Compress(request).shadow().error(), "");
  EXPECT_EQ(Metric("keepset_shadow_operations_total{result=\"skipped\"}"), 1);
}

TEST_F(ShadowTables, OfTheServersWishAreCountedAndNotReported) {
  Start("shadow { table { name: 'b' } percent: 100 }");
  for (int i = 0; i < 3; ++i) {
    v1::CompressRequest request = Request();
    request.mutable_spec()->set_request_id(absl::StrCat("request-", i));
    EXPECT_FALSE(Compress(request).has_shadow());
  }
  EXPECT_TRUE(Eventually(
      [&] { return Metric("keepset_shadow_operations_total{result=\"scored\"}") == 3; }));
  EXPECT_EQ(Metric("keepset_shadow_kept_overlap_count"), 3);
}

}  // namespace
}  // namespace keepset::integration
