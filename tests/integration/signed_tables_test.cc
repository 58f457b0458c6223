// keepsetd that wants signed tables, whatever way they come: out of etcd, through another server of
// the fleet, or out of its own state directory after somebody had hands on it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/types/span.h"
#include "clients/cpp/table_client.h"
#include "tables/table_signature.h"
#include "tests/fakes/signing_key.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/etcd_server.h"
#include "tests/integration/server_fixture.h"

namespace keepset::integration {
namespace {

namespace fs = std::filesystem;
using client::TableState;
using testing::HasSubstr;

constexpr char kTableKey[] = "/keepset/tables/a/1";
constexpr char kSignatureKey[] = "/keepset/signatures/a/1";
constexpr char kLineKey[] = "/keepset/lines/a";
constexpr char kStable[] = R"({"stable": {"version": "1"}})";

class SignedTables : public testing::Test {
 protected:
  std::string Wanted() const {
    return absl::StrCat("table_writes: true require_signature: true trusted_key_files: \"",
                        alice_.public_path, "\" ");
  }
  static std::string Sign(const std::string& bytes, const fakes::SigningKey& by) {
    return tables::SignBytes(
               absl::MakeConstSpan(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()),
               by.private_path)
        .value_or("");
  }
  static std::unique_ptr<client::TableClient> Tables(const TestServer& server) {
    client::ClientOptions options;
    options.address = server.address();
    auto client = client::TableClient::New(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }
  static client::TableRef First() {
    client::TableRef ref;
    ref.name = "a";
    ref.version = "1";
    return ref;
  }
  absl::Status Upload(const TestServer& server, const std::string& signature) const {
    client::TableUpload upload;
    upload.signature = signature;
    return Tables(server)->Load(table_, upload).status();
  }
  static std::string Active(const TestServer& server) {
    const auto list = Tables(server)->List("a", "");
    if (!list.ok() || list->lines.empty()) return "";
    return list->lines[0].active_version;
  }
  // Why version 1 is failed; empty: it is not.
  static std::string Failure(const TestServer& server) {
    const auto list = Tables(server)->List("", "");
    if (!list.ok()) return list.status().ToString();
    for (const client::TableLine& line : list->lines) {
      for (const client::TableVersion& version : line.versions) {
        if (version.state == TableState::kFailed && version.version == "1") return version.reason;
      }
    }
    return "";
  }

  const fakes::ScratchDirectory files_;
  const fakes::SigningKey alice_ = fakes::NewSigningKey(files_.path(), "alice");
  const fakes::SigningKey mallory_ = fakes::NewSigningKey(files_.path(), "mallory");
  const std::string table_ = fakes::TableBytes("a", "1");
};

class SignedTablesInEtcd : public SignedTables {
 protected:
  void SetUp() override { ASSERT_TRUE(etcd_.Start()); }
  std::string Config() const {
    return absl::StrCat(Wanted(), "etcd { endpoints: \"", etcd_.endpoint(), "\" }");
  }
  EtcdServer etcd_;
};

TEST_F(SignedTablesInEtcd, AreActiveWithTheirSignatureOfTheSameRevision) {
  const TestServer server(Config());
  etcd_.PutAll({{kLineKey, kStable}, {kTableKey, table_}, {kSignatureKey, Sign(table_, alice_)}});
  EXPECT_TRUE(Eventually([&] { return Active(server) == "1"; }));
  EXPECT_EQ(Failure(server), "");
}

TEST_F(SignedTablesInEtcd, AreFailedWithoutOneUntilItComes) {
  etcd_.PutAll({{kLineKey, kStable}, {kTableKey, table_}});
  const TestServer server(Config());
  EXPECT_THAT(Failure(server), HasSubstr("no signature"));
  EXPECT_EQ(Active(server), "");
  etcd_.Put(kSignatureKey, Sign(table_, alice_));
  EXPECT_TRUE(Eventually([&] { return Active(server) == "1"; }));
  EXPECT_EQ(Failure(server), "");
}

TEST_F(SignedTablesInEtcd, AreFailedWithSomebodyElsesSignature) {
  etcd_.PutAll({{kLineKey, kStable}, {kTableKey, table_}, {kSignatureKey, Sign(table_, mallory_)}});
  const TestServer server(Config());
  EXPECT_THAT(Failure(server), HasSubstr("signature"));
  EXPECT_EQ(Active(server), "");
  EXPECT_FALSE(Tables(server)->Activate(First(), "", {}).ok());
}

TEST_F(SignedTablesInEtcd, OfAnotherTableUnderAnOldSignatureAreFailed) {
  etcd_.PutAll({{kLineKey, kStable},
                {kTableKey, fakes::TableBytes("a", "1", 1.25f)},
                {kSignatureKey, Sign(table_, alice_)}});
  const TestServer server(Config());
  EXPECT_NE(Failure(server), "");
  EXPECT_EQ(Active(server), "");
}

TEST_F(SignedTablesInEtcd, StayInServiceAsLastGoodWhenTheSignatureIsReplacedByAWrongOne) {
  etcd_.PutAll({{kLineKey, kStable}, {kTableKey, table_}, {kSignatureKey, Sign(table_, alice_)}});
  const TestServer server(Config());
  ASSERT_EQ(Active(server), "1");
  etcd_.Put(kSignatureKey, Sign(table_, mallory_));
  EXPECT_TRUE(Eventually([&] { return !Failure(server).empty(); }));
  EXPECT_EQ(Active(server), "1");
  // A server that never saw the right one has nothing to go on with.
  const TestServer other(Config());
  EXPECT_EQ(Active(other), "");
}

TEST_F(SignedTablesInEtcd, ReachOtherServersWithTheSignatureTheyWereUploadedWith) {
  const TestServer one(Config());
  const TestServer other(Config());
  EXPECT_EQ(Upload(one, "").code(), absl::StatusCode::kPermissionDenied);
  const absl::Status loaded = Upload(one, Sign(table_, alice_));
  ASSERT_TRUE(loaded.ok()) << loaded;
  ASSERT_TRUE(Tables(one)->Activate(First(), "", {}).ok());
  EXPECT_TRUE(Eventually([&] { return Active(other) == "1"; }));
  EXPECT_EQ(Failure(other), "");
}

TEST_F(SignedTablesInEtcd, TakeTheirSignatureAlongWhenUnloaded) {
  const TestServer server(Config());
  ASSERT_TRUE(Upload(server, Sign(table_, alice_)).ok());
  EXPECT_NE(etcd_.Get(kSignatureKey), "");
  ASSERT_TRUE(Tables(server)->Unload(First(), {}).ok());
  EXPECT_EQ(etcd_.Get(kSignatureKey), "");
}

// One start with a signed and active table, hands on the directory, another start.
class SignedStateDirectory : public SignedTables {
 protected:
  void SetUp() override {
    const TestServer server(Config());
    const absl::Status loaded = Upload(server, Sign(table_, alice_));
    ASSERT_TRUE(loaded.ok()) << loaded;
    ASSERT_TRUE(Tables(server)->Activate(First(), "", {}).ok());
  }
  std::string Config() const {
    return absl::StrCat(Wanted(), "state_directory: \"", directory_, "\"");
  }
  std::string FileOf(const std::string& bytes) const {
    return absl::StrCat(directory_, "/sha256-", fakes::DigestOf(bytes).substr(7), ".safetensors");
  }
  static std::string Read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

  const std::string directory_ = files_ / "state";
};

TEST_F(SignedStateDirectory, IsServedAgainAsItWasLeft) {
  const TestServer server(Config());
  EXPECT_EQ(Active(server), "1");
  EXPECT_EQ(Failure(server), "");
}

TEST_F(SignedStateDirectory, WithoutTheSignatureItsTableIsFailedUntilItIsBack) {
  const std::string signature = FileOf(table_) + ".sig";
  const std::string bytes = Read(signature);
  fs::remove(signature);
  {
    TestServer server(Config());
    EXPECT_THAT(Failure(server), HasSubstr("no signature"));
    EXPECT_EQ(Active(server), "");
    EXPECT_TRUE(server.log().AwaitLine({"table_refused", "no signature"}));
    EXPECT_EQ(Tables(server)->Activate(First(), "", {}).status().code(),
              absl::StatusCode::kNotFound);
  }
  fakes::WriteAndRename(signature, bytes);
  const TestServer server(Config());
  EXPECT_EQ(Active(server), "1");
}

TEST_F(SignedStateDirectory, WithSomebodyElsesSignatureItsTableIsFailed) {
  fakes::WriteAndRename(FileOf(table_) + ".sig", Sign(table_, mallory_));
  const TestServer server(Config());
  EXPECT_THAT(Failure(server), HasSubstr("signature"));
  EXPECT_EQ(Active(server), "");
}

TEST_F(SignedStateDirectory, WithAnotherTableInPlaceOfItsOwnServesNeither) {
  // Digest, file name and document agree; only the signature cannot be made.
  const std::string other = fakes::TableBytes("a", "1", 1.25f);
  fakes::WriteAndRename(FileOf(other), other);
  fs::rename(FileOf(table_) + ".sig", FileOf(other) + ".sig");
  fs::remove(FileOf(table_));
  const std::string document = directory_ + "/registry.json";
  fakes::WriteAndRename(
      document,
      absl::StrReplaceAll(Read(document), {{fakes::DigestOf(table_), fakes::DigestOf(other)}}));
  const TestServer server(Config());
  EXPECT_THAT(Failure(server), HasSubstr("signature"));
  EXPECT_EQ(Active(server), "");
}

TEST_F(SignedStateDirectory, WithOtherBytesUnderItsNameIsFailedByDigest) {
  fakes::WriteAndRename(FileOf(table_), fakes::TableBytes("a", "1", 1.25f));
  const TestServer server(Config());
  EXPECT_THAT(Failure(server), HasSubstr(fakes::DigestOf(table_)));
  EXPECT_EQ(Active(server), "");
}

TEST_F(SignedStateDirectory, OfATableThatComesBackSignedIsMended) {
  fs::remove(FileOf(table_) + ".sig");
  const TestServer server(Config());
  ASSERT_EQ(Active(server), "");
  const absl::Status loaded = Upload(server, Sign(table_, alice_));
  ASSERT_TRUE(loaded.ok()) << loaded;
  EXPECT_EQ(Active(server), "1");
  EXPECT_EQ(Failure(server), "");
  const auto listed = Tables(server)->List("", "");
  ASSERT_TRUE(listed.ok()) << listed.status();
  for (const client::TableSource& source : listed->sources) {
    EXPECT_TRUE(source.healthy) << source.source << ": " << source.detail;
  }
}

}  // namespace
}  // namespace keepset::integration
