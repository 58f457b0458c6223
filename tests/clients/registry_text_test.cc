#include "clients/cli/registry_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "clients/cli/exit_status.h"

namespace keepset::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(ParseTableRef, NameAlone) {
  const auto ref = ParseTableRef("llama-8b");
  ASSERT_TRUE(ref.ok());
  EXPECT_EQ(ref->name, "llama-8b");
  EXPECT_EQ(ref->version + ref->digest + ref->alias, "");
}

TEST(ParseTableRef, Version) {
  const auto ref = ParseTableRef("llama-8b@2.1");
  ASSERT_TRUE(ref.ok());
  EXPECT_EQ(ref->name, "llama-8b");
  EXPECT_EQ(ref->version, "2.1");
}

TEST(ParseTableRef, Digest) {
  const auto ref = ParseTableRef("llama-8b@sha256:ab");
  ASSERT_TRUE(ref.ok());
  EXPECT_EQ(ref->name, "llama-8b");
  EXPECT_EQ(ref->digest, "sha256:ab");
  EXPECT_EQ(ref->version, "");
}

TEST(ParseTableRef, Alias) {
  const auto ref = ParseTableRef("llama-8b:canary");
  ASSERT_TRUE(ref.ok());
  EXPECT_EQ(ref->name, "llama-8b");
  EXPECT_EQ(ref->alias, "canary");
}

TEST(ParseTableRef, HalfANameIsAUsageError) {
  for (const char* text : {"", "@1", ":stable", "a@", "a:"}) {
    const absl::Status status = ParseTableRef(text).status();
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kUsage) << text;
    EXPECT_THAT(status.message(), HasSubstr("NAME@VERSION")) << text;
  }
}

client::TableList SomeTables() {
  client::TableVersion active;
  active.name = "tiny";
  active.version = "1";
  active.digest = "sha256:1111111111111111";
  active.kind = "compilerkv";
  active.state = client::TableState::kActive;
  client::TableVersion next = active;
  next.version = "2";
  next.digest = "sha256:2222222222222222";
  next.state = client::TableState::kReady;
  client::TableVersion broken;
  broken.origin = "broken.safetensors";
  broken.reason = "header longer than the file";
  broken.state = client::TableState::kFailed;
  client::TableLine line;
  line.name = "tiny";
  line.revision = 7;
  line.active_version = "1";
  line.canary = client::TableCanary{"2", next.digest, 12.5, "s"};
  line.aliases = {{"audit", "1", active.digest}};
  line.versions = {active, next};
  client::TableList list;
  list.revision = 9;
  list.authority = "local";
  list.lines = {line};
  list.nameless = {broken};
  list.sources = {{"directory", true, "", absl::UnixEpoch()},
                  {"etcd", false, "connection refused", absl::UnixEpoch()}};
  return list;
}

TEST(RegistryText, SaysStateAndRoleOfEachVersion) {
  const std::string text = RegistryText(SomeTables());
  EXPECT_THAT(text, ::testing::ContainsRegex("tiny +1 +active +stable, audit"));
  EXPECT_THAT(text, ::testing::ContainsRegex("tiny +2 +ready +canary 12.5%"));
}

TEST(RegistryText, NamesRefusedTablesAndTheirReason) {
  EXPECT_THAT(RegistryText(SomeTables()),
              HasSubstr("failed  broken.safetensors: header longer than the file"));
}

TEST(RegistryText, NamesOnlySourcesThatAreNotWell) {
  const std::string text = RegistryText(SomeTables());
  EXPECT_THAT(text, HasSubstr("source  etcd since 1970-01-01T00:00:00Z: connection refused"));
  EXPECT_THAT(text, Not(HasSubstr("source  directory")));
}

TEST(RegistryText, SaysWhoDecidesAndWhetherWritesAreTaken) {
  EXPECT_THAT(RegistryText(SomeTables()), HasSubstr("revision 9, authority local, read-only"));
}

TEST(RegistryText, EmptyRegistryIsSaid) {
  EXPECT_THAT(RegistryText(client::TableList()), HasSubstr("no tables"));
}

TEST(RegistryJson, HasTheFullDigestsAndNullForNoCanary) {
  client::TableList list = SomeTables();
  list.lines[0].canary.reset();
  const nlohmann::ordered_json json = RegistryJson(list);
  EXPECT_EQ(json["lines"][0]["versions"][1]["digest"], "sha256:2222222222222222");
  EXPECT_TRUE(json["lines"][0]["canary"].is_null());
  EXPECT_EQ(json["lines"][0]["aliases"]["audit"]["version"], "1");
}

TEST(RegistryJson, NotStatedTimesAreEmpty) {
  EXPECT_EQ(VersionJson(client::TableVersion())["created"], "");
}

}  // namespace
}  // namespace keepset::cli
