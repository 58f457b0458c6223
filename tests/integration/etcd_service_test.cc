// keepsetd with its tables in etcd, from the outside: two servers of a fleet, etcd killed and
// restarted while operations run, a server restarted without etcd, a canary.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cpp/table_client.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/etcd_server.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/table_answers.h"
#include "tests/integration/typed_worker.h"

namespace keepset::integration {
namespace {

using testing::HasSubstr;

constexpr int64_t kBudget = 40;

class EtcdService : public testing::Test {
 protected:
  EtcdService() {
    for (const AnsweringTable& table : {old_, new_}) by_digest_[table.digest] = table;
  }
  void SetUp() override { ASSERT_TRUE(etcd_.Start()); }

  std::string Config() const {
    return absl::StrCat("table_writes: true etcd { endpoints: \"", etcd_.endpoint(),
                        "\" start_timeout_ms: 5000 }");
  }

  static std::unique_ptr<client::TableClient> Tables(const TestServer& server) {
    client::ClientOptions options;
    options.address = server.address();
    auto client = client::TableClient::New(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  static client::TableRef Ref(const std::string& version) {
    client::TableRef table;
    table.name = "live";
    table.version = version;
    return table;
  }

  // Both versions uploaded through `server`, the old one active.
  void LoadBoth(const TestServer& server) {
    const auto tables = Tables(server);
    for (const AnsweringTable& table : {old_, new_}) {
      client::TableUpload upload;
      upload.actor = "test";
      const auto loaded = tables->Load(table.file, upload);
      ASSERT_TRUE(loaded.ok()) << loaded.status();
      EXPECT_TRUE(loaded->durable);
    }
    const auto active = tables->Activate(Ref("old"), "", {.actor = "test"});
    ASSERT_TRUE(active.ok()) << active.status();
  }

  static std::string ActiveVersion(const TestServer& server) {
    const auto list = Tables(server)->List("live", "");
    if (!list.ok() || list->lines.empty()) return "";
    return list->lines[0].active_version;
  }

  // As `keepset registry list` and `show` print them: of the whole, of line "live" by List and Get.
  static std::vector<uint64_t> Revisions(const TestServer& server) {
    const auto list = Tables(server)->List("", "");
    const auto details = Tables(server)->Get(Ref("old"));
    if (!list.ok() || list->lines.empty() || !details.ok()) return {};
    return {list->revision, list->lines[0].revision, details->revision};
  }

  // The version that answers an operation without a pin.
  std::string AnsweredBy(const TestServer& server, const std::string& request_id = "") {
    const auto client = ConnectTo(server.address(), client::Transport::kInline);
    if (client == nullptr) return "";
    client::OperationSpec spec = TypedSpec(prompt_, "compilerkv", kBudget);
    spec.table.name = "live";
    spec.request_id = request_id;
    const auto result = client->CompressUnary(spec, layers_);
    findings_.Add(result, by_digest_, "");
    return result.ok() && result->table.has_value() ? result->table->version : "";
  }

  // Empty while the source is healthy.
  static std::string Trouble(const TestServer& server) {
    const auto list = Tables(server)->List("", "");
    if (!list.ok()) return list.status().ToString();
    for (const client::TableSource& source : list->sources) {
      if (source.source == "etcd") return source.healthy ? "" : source.detail;
    }
    return "no source etcd";
  }

  const fakes::SyntheticPrompt prompt_{{.num_layers = 2}};
  const std::vector<client::LayerInput> layers_ = TypedLayers(prompt_);
  const AnsweringTable old_ = MakeAnsweringTable(prompt_, "live", "old", 0.80f, kBudget);
  const AnsweringTable new_ = MakeAnsweringTable(prompt_, "live", "new", 0.95f, kBudget);
  TablesByDigest by_digest_;
  Findings findings_;
  EtcdServer etcd_;
};

TEST_F(EtcdService, TwoServersServeWhatIsActivatedThroughOneOfThem) {
  const TestServer one(Config());
  const TestServer other(Config());
  LoadBoth(one);
  ASSERT_TRUE(Eventually([&] { return ActiveVersion(other) == "old"; }));
  EXPECT_EQ(AnsweredBy(other), "old");
  ASSERT_TRUE(Tables(other)->Activate(Ref("new"), "", {.actor = "test"}).ok());
  EXPECT_EQ(AnsweredBy(other), "new");
  ASSERT_TRUE(Eventually([&] { return ActiveVersion(one) == "new"; }));
  EXPECT_EQ(AnsweredBy(one), "new");
  EXPECT_EQ(Tables(one)->List("", "")->authority, "etcd");
  EXPECT_EQ(findings_.first_complaint(), "");
}

TEST_F(EtcdService, ServersWithTheSameStateShowTheSameRevisions) {
  const TestServer one(Config());
  LoadBoth(one);
  // What happens to one server alone does not count.
  etcd_.Kill();
  EXPECT_TRUE(Eventually([&] { return !Trouble(one).empty(); }));
  ASSERT_TRUE(etcd_.Start());
  EXPECT_TRUE(Eventually([&] { return Trouble(one).empty(); }));
  etcd_.Put("/somebody/else", "x");
  const TestServer other(Config());
  ASSERT_EQ(ActiveVersion(other), "old");
  EXPECT_EQ(Revisions(one), Revisions(other));

  const auto written = Tables(other)->Activate(Ref("new"), "", {.actor = "test"});
  ASSERT_TRUE(written.ok()) << written.status();
  ASSERT_TRUE(Eventually([&] { return ActiveVersion(one) == "new"; }));
  EXPECT_EQ(Revisions(one), Revisions(other));
  EXPECT_THAT(Revisions(one), testing::Each(written->revision));

  // Somebody who looked at one server may decide on the other, and is told when it is too late.
  EXPECT_TRUE(
      Tables(one)
          ->Activate(Ref("old"), "", {.actor = "test", .expected_revision = written->line.revision})
          .ok());
  EXPECT_EQ(
      Tables(other)
          ->Activate(Ref("new"), "", {.actor = "test", .expected_revision = written->line.revision})
          .status()
          .code(),
      absl::StatusCode::kAborted);
}

TEST_F(EtcdService, AServerRestartedWithoutEtcdShowsTheRevisionItServes) {
  const fakes::ScratchDirectory state;
  const std::string config = absl::StrCat(Config(), " state_directory: \"", state / "s", "\"");
  std::vector<uint64_t> before;
  {
    const TestServer server(config);
    LoadBoth(server);
    before = Revisions(server);
  }
  etcd_.Kill();
  const TestServer server(config);
  EXPECT_EQ(Revisions(server), before);
}

TEST_F(EtcdService, NothingFailsWhileEtcdIsKilledAndRestarted) {
  TestServer server(Config());
  LoadBoth(server);
  std::atomic<bool> stop = false;
  std::vector<std::thread> workers;
  for (int i = 0; i < 4; ++i) {
    workers.emplace_back([&] {
      while (!stop) AnsweredBy(server);
    });
  }
  for (int round = 0; round < 3; ++round) {
    const std::string next = round % 2 == 0 ? "new" : "old";
    etcd_.Kill();
    EXPECT_TRUE(Eventually([&] { return !Trouble(server).empty(); }));
    EXPECT_THAT(Trouble(server), HasSubstr("serving what etcd said"));
    const auto refused = Tables(server)->Activate(Ref(next), "", {.actor = "test"});
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable) << refused.status();
    EXPECT_TRUE(etcd_.Start());
    EXPECT_TRUE(Eventually([&] { return Trouble(server).empty(); }));
    const auto active = Tables(server)->Activate(Ref(next), "", {.actor = "test"});
    EXPECT_TRUE(active.ok()) << active.status();
    EXPECT_EQ(AnsweredBy(server), next);
  }
  stop = true;
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(findings_.first_complaint(), "");
}

TEST_F(EtcdService, RestartedWithoutEtcdItAnswersFromItsStateDirectory) {
  const fakes::ScratchDirectory state;
  const std::string config = absl::StrCat(Config(), " state_directory: \"", state / "s", "\"");
  {
    const TestServer server(config);
    LoadBoth(server);
  }
  etcd_.Kill();
  const TestServer server(config);
  EXPECT_EQ(AnsweredBy(server), "old");
  EXPECT_THAT(Trouble(server), HasSubstr("kept on disk"));
  ASSERT_TRUE(etcd_.Start());
  EXPECT_TRUE(Eventually([&] { return Trouble(server).empty(); }));
  EXPECT_EQ(findings_.first_complaint(), "");
}

TEST_F(EtcdService, StartsWithoutEtcdAndWithoutStateAndSaysSo) {
  etcd_.Kill();
  const TestServer server(Config());
  EXPECT_NE(Trouble(server), "");
  EXPECT_TRUE(Tables(server)->List("", "")->lines.empty());
  ASSERT_TRUE(etcd_.Start());
  EXPECT_TRUE(Eventually([&] { return Trouble(server).empty(); }));
  LoadBoth(server);
  EXPECT_EQ(AnsweredBy(server), "old");
}

TEST_F(EtcdService, ACanaryTakesTheSameRequestsOnEveryServer) {
  const TestServer one(Config());
  const TestServer other(Config());
  LoadBoth(one);
  ASSERT_TRUE(Tables(one)->SetCanary(Ref("new"), 50, "salt", {.actor = "test"}).ok());
  ASSERT_TRUE(Eventually([&] {
    const auto list = Tables(other)->List("live", "");
    return list.ok() && !list->lines.empty() && list->lines[0].canary.has_value();
  }));
  int canary = 0;
  constexpr int kRequests = 40;
  for (int i = 0; i < kRequests; ++i) {
    const std::string id = absl::StrCat("request-", i);
    const std::string version = AnsweredBy(one, id);
    EXPECT_EQ(AnsweredBy(other, id), version) << id;
    if (version == "new") ++canary;
  }
  EXPECT_GT(canary, 0);
  EXPECT_LT(canary, kRequests);
  EXPECT_EQ(findings_.first_complaint(), "");
}

}  // namespace
}  // namespace keepset::integration
