// The client against the real etcd.
#include "service/registry/etcd/etcd_client.h"

#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/certificates.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/etcd_server.h"

namespace keepset::service::etcd {
namespace {

using integration::EtcdServer;
using testing::HasSubstr;

// Nobody listens on the discard port.
constexpr const char* kDeadEndpoint = "127.0.0.1:9";

std::unique_ptr<Client> Connect(const ClientOptions& options) {
  absl::StatusOr<std::unique_ptr<Client>> client = NewClient(options);
  EXPECT_TRUE(client.ok()) << client.status();
  return *std::move(client);
}

std::unique_ptr<Client> Connect(const EtcdServer& server) {
  ClientOptions options;
  options.endpoints = {server.endpoint()};
  return Connect(options);
}

WatchEvent NextOf(WatchStream& stream) {
  absl::StatusOr<WatchEvent> event = stream.Next();
  EXPECT_TRUE(event.ok()) << event.status();
  return event.ok() ? *std::move(event) : WatchEvent();
}

std::vector<std::string> KeysOf(const RangeResult& range) {
  std::vector<std::string> keys;
  for (const KeyValue& pair : range.pairs) keys.push_back(pair.key);
  return keys;
}

class EtcdClientTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(server_.Start());
    client_ = Connect(server_);
  }

  std::unique_ptr<WatchStream> Watch(absl::string_view prefix, int64_t first_revision) {
    absl::StatusOr<std::unique_ptr<WatchStream>> stream = client_->Watch(prefix, first_revision);
    EXPECT_TRUE(stream.ok()) << stream.status();
    return *std::move(stream);
  }

  EtcdServer server_;
  std::unique_ptr<Client> client_;
};

TEST_F(EtcdClientTest, ReadsAPrefixInSeveralCallsAtOneRevision) {
  std::vector<std::string> keys;
  for (int i = 0; i < 40; ++i) {
    keys.push_back(absl::StrFormat("p/%02d", i));
    server_.Put(keys.back(), absl::StrCat(i));
  }
  server_.PutAll({{"p", "before"}, {"p0", "behind"}});
  const auto range = client_->ReadPrefix("p/");
  ASSERT_TRUE(range.ok()) << range.status();
  EXPECT_EQ(KeysOf(*range), keys);
  EXPECT_EQ(range->pairs[39].value, "39");
  EXPECT_EQ(range->revision, server_.Revision());
  EXPECT_EQ(range->pairs[39].mod_revision, range->revision - 1);
}

TEST_F(EtcdClientTest, KnowsWhenTheNewestKeyBelowAPrefixWasWritten) {
  server_.PutAll({{"p/b", "1"}, {"p/a", "2"}});
  const int64_t newest = server_.Revision();
  server_.Put("q", "elsewhere");
  const auto found = client_->NewestRevision("p/");
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(*found, newest);
  const auto none = client_->NewestRevision("none/");
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(*none, 0);
}

TEST_F(EtcdClientTest, CommitsAllWritesAtOneRevision) {
  server_.Put("gone", "x");
  const auto revision = client_->Commit({{"new", 0}}, {{Write::Kind::kPut, "new", "1"},
                                                       {Write::Kind::kPut, "other", "2"},
                                                       {Write::Kind::kDelete, "gone", ""}});
  ASSERT_TRUE(revision.ok()) << revision.status();
  const auto range = client_->ReadPrefix("");
  ASSERT_TRUE(range.ok()) << range.status();
  EXPECT_EQ(KeysOf(*range), (std::vector<std::string>{"new", "other"}));
  for (const KeyValue& pair : range->pairs) EXPECT_EQ(pair.mod_revision, *revision);
}

TEST_F(EtcdClientTest, CommitsNothingWhenSomebodyElseWroteMeanwhile) {
  server_.Put("line", "1");
  const int64_t seen = server_.Revision();
  server_.Put("line", "2");
  const auto late = client_->Commit({{"line", seen}}, {{Write::Kind::kPut, "line", "mine"}});
  EXPECT_TRUE(absl::IsAborted(late.status())) << late.status();
  EXPECT_EQ(server_.Get("line"), "2");
  const auto exists = client_->Commit({{"line", 0}}, {{Write::Kind::kPut, "line", "mine"}});
  EXPECT_TRUE(absl::IsAborted(exists.status())) << exists.status();
}

TEST_F(EtcdClientTest, RefusesWhatIsLargerThanEtcdTakesWithEtcdsReason) {
  const auto status =
      client_->Commit({}, {{Write::Kind::kPut, "k", std::string(4 << 20, 'x')}}).status();
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr("larger than"));
}

TEST_F(EtcdClientTest, WatchTellsEachRevisionWhole) {
  server_.Put("p/gone", "x");
  const auto stream = Watch("p/", server_.Revision() + 1);
  EXPECT_EQ(NextOf(*stream).kind, WatchEvent::Kind::kCreated);
  const int64_t both = server_.PutAll({{"p/a", "1"}, {"elsewhere", "x"}, {"p/b", "2"}});
  server_.Delete("p/gone");
  const WatchEvent first = NextOf(*stream);
  EXPECT_EQ(first.kind, WatchEvent::Kind::kChanged);
  EXPECT_EQ(first.revision, both);
  ASSERT_EQ(first.changes.size(), 2);
  EXPECT_EQ(first.changes[0].pair.value, "1");
  EXPECT_EQ(first.changes[1].pair.key, "p/b");
  const WatchEvent second = NextOf(*stream);
  EXPECT_EQ(second.revision, both + 1);
  ASSERT_EQ(second.changes.size(), 1);
  EXPECT_EQ(second.changes[0].kind, Change::Kind::kDelete);
  EXPECT_EQ(second.changes[0].pair.key, "p/gone");
}

TEST_F(EtcdClientTest, WatchTellsWhatHappenedBeforeItBeganHoweverLarge) {
  const int64_t before = server_.Revision();
  constexpr int kValues = 5;
  for (int i = 0; i < kValues; ++i) {
    server_.Put("p/large", std::string(1 << 20, static_cast<char>('a' + i)));
  }
  const auto stream = Watch("p/", before + 1);
  EXPECT_EQ(NextOf(*stream).kind, WatchEvent::Kind::kCreated);
  for (int i = 0; i < kValues; ++i) {
    const WatchEvent event = NextOf(*stream);
    EXPECT_EQ(event.revision, before + 1 + i);
    ASSERT_EQ(event.changes.size(), 1);
    EXPECT_EQ(event.changes[0].pair.value, std::string(1 << 20, static_cast<char>('a' + i)));
  }
}

TEST_F(EtcdClientTest, WatchFromAForgottenRevisionSaysSo) {
  server_.Put("p/a", "1");
  const int64_t forgotten = server_.Revision();
  server_.Put("p/a", "2");
  server_.Put("p/a", "3");
  server_.Compact();
  const auto stream = Watch("p/", forgotten);
  WatchEvent event = NextOf(*stream);
  if (event.kind == WatchEvent::Kind::kCreated) event = NextOf(*stream);
  EXPECT_EQ(event.kind, WatchEvent::Kind::kCompacted);
  EXPECT_EQ(event.revision, server_.Revision());
}

TEST_F(EtcdClientTest, CancelEndsAWaitingWatch) {
  const auto stream = Watch("p/", 0);
  EXPECT_EQ(NextOf(*stream).kind, WatchEvent::Kind::kCreated);
  std::thread canceller([&] { stream->Cancel(); });
  EXPECT_TRUE(absl::IsCancelled(stream->Next().status()));
  canceller.join();
}

TEST_F(EtcdClientTest, WatchEndsWhenEtcdIsKilled) {
  const auto stream = Watch("p/", 0);
  EXPECT_EQ(NextOf(*stream).kind, WatchEvent::Kind::kCreated);
  server_.Kill();
  EXPECT_TRUE(absl::IsUnavailable(stream->Next().status()));
}

TEST_F(EtcdClientTest, WatchEndsWhenEtcdAnswersNoPings) {
  ClientOptions options;
  options.endpoints = {server_.endpoint()};
  options.keepalive = absl::Milliseconds(200);
  client_ = Connect(options);
  const auto stream = Watch("p/", 0);
  EXPECT_EQ(NextOf(*stream).kind, WatchEvent::Kind::kCreated);
  server_.Freeze();
  EXPECT_TRUE(absl::IsUnavailable(stream->Next().status()));
  server_.Thaw();
}

TEST_F(EtcdClientTest, SaysWhichEndpointDoesNotAnswer) {
  server_.Kill();
  const absl::Status status = client_->ReadPrefix("p/").status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(server_.endpoint()));
}

TEST_F(EtcdClientTest, GoesOnAfterARestartOfEtcd) {
  server_.Put("p/a", "1");
  ASSERT_TRUE(client_->ReadPrefix("p/").ok());
  server_.Kill();
  ASSERT_TRUE(server_.Start());
  const auto range = client_->ReadPrefix("p/");
  ASSERT_TRUE(range.ok()) << range.status();
  EXPECT_EQ(range->pairs.size(), 1);
}

TEST_F(EtcdClientTest, MovesOnFromAnEndpointThatDoesNotAnswer) {
  ClientOptions options;
  options.endpoints = {kDeadEndpoint, server_.endpoint()};
  const auto client = Connect(options);
  EXPECT_TRUE(client->ReadPrefix("p/").ok());
  EXPECT_TRUE(client->Commit({}, {{Write::Kind::kPut, "p/a", "1"}}).ok());
  const auto stream = client->Watch("p/", 1);
  ASSERT_TRUE(stream.ok()) << stream.status();
  EXPECT_EQ(NextOf(**stream).kind, WatchEvent::Kind::kCreated);
}

TEST_F(EtcdClientTest, ShutdownEndsACallThatWaits) {
  ASSERT_TRUE(client_->ReadPrefix("p/").ok());
  server_.Freeze();
  std::thread stopper([&] { client_->Shutdown(); });
  EXPECT_TRUE(absl::IsCancelled(client_->ReadPrefix("p/").status()));
  stopper.join();
  server_.Thaw();
}

TEST_F(EtcdClientTest, LogsInAndAgainAfterEtcdForgotItsToken) {
  const fakes::ScratchDirectory directory;
  ClientOptions options;
  options.endpoints = {server_.endpoint()};
  options.username = "root";
  options.password_file = directory / "password";
  fakes::WriteInPlace(options.password_file, "open sesame\n");
  server_.RequireLogin("open sesame");
  EXPECT_FALSE(client_->ReadPrefix("p/").ok()) << "without a login";
  const auto client = Connect(options);
  const auto before = client->ReadPrefix("p/");
  ASSERT_TRUE(before.ok()) << before.status();
  server_.Kill();
  ASSERT_TRUE(server_.Start());
  const auto after = client->Commit({}, {{Write::Kind::kPut, "p/a", "1"}});
  EXPECT_TRUE(after.ok()) << after.status();
  fakes::WriteInPlace(options.password_file, "wrong");
  const absl::Status refused = Connect(options)->ReadPrefix("p/").status();
  EXPECT_FALSE(refused.ok());
  EXPECT_THAT(std::string(refused.message()), HasSubstr("Authenticate"));
}

TEST_F(EtcdClientTest, ADirectoryInPlaceOfAFileIsNamed) {
  const fakes::ScratchDirectory directory;
  ClientOptions options;
  options.endpoints = {server_.endpoint()};
  options.username = "root";
  options.password_file = directory.path();
  const absl::Status refused = Connect(options)->ReadPrefix("p/").status();
  EXPECT_THAT(std::string(refused.message()), HasSubstr("Is a directory"));
}

class EtcdTlsTest : public testing::Test {
 protected:
  EtcdTlsTest() {
    authority_.Issue("localhost");
    authority_.Issue("keepset");
    server_ = std::make_unique<EtcdServer>(
        std::vector<std::string>{"--cert-file", authority_.Path("localhost.pem"), "--key-file",
                                 authority_.Path("localhost.key"), "--trusted-ca-file",
                                 authority_.Path("ca.pem"), "--client-cert-auth"},
        "https");
  }

  ClientOptions Options() const {
    ClientOptions options;
    options.endpoints = {"https://" + server_->endpoint()};
    options.ca_file = authority_.Path("ca.pem");
    options.certificate_file = authority_.Path("keepset.pem");
    options.key_file = authority_.Path("keepset.key");
    return options;
  }

  const fakes::ScratchDirectory directory_;
  fakes::CertificateAuthority authority_{directory_.path()};
  std::unique_ptr<EtcdServer> server_;
};

TEST_F(EtcdTlsTest, SpeaksTlsWithACertificateOfItsOwn) {
  ASSERT_TRUE(server_->Start());
  const auto client = Connect(Options());
  const auto revision = client->Commit({}, {{Write::Kind::kPut, "p/a", "1"}});
  ASSERT_TRUE(revision.ok()) << revision.status();
  const auto stream = client->Watch("p/", *revision);
  ASSERT_TRUE(stream.ok()) << stream.status();
  EXPECT_EQ(NextOf(**stream).kind, WatchEvent::Kind::kCreated);
  EXPECT_EQ(NextOf(**stream).revision, *revision);
}

TEST_F(EtcdTlsTest, RefusesAServerOfAnotherAuthority) {
  ASSERT_TRUE(server_->Start());
  ClientOptions options = Options();
  const fakes::ScratchDirectory elsewhere;
  options.ca_file = fakes::CertificateAuthority(elsewhere.path()).Path("ca.pem");
  options.request_timeout = absl::Seconds(1);
  EXPECT_FALSE(Connect(options)->ReadPrefix("p/").ok());
}

TEST_F(EtcdTlsTest, ReadsReplacedFilesWhenItConnectsAgain) {
  ASSERT_TRUE(server_->Start());
  ClientOptions options = Options();
  options.ca_file = directory_ / "mounted.pem";
  const auto client = Connect(options);
  const absl::Status missing = client->ReadPrefix("p/").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(missing)) << missing;
  EXPECT_THAT(std::string(missing.message()), HasSubstr("mounted.pem"));
  std::filesystem::copy_file(authority_.Path("ca.pem"), options.ca_file);
  const absl::Status present = client->ReadPrefix("p/").status();
  EXPECT_TRUE(present.ok()) << present;
}

}  // namespace
}  // namespace keepset::service::etcd
