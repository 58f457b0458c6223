#include "service/registry/etcd/etcd_layout.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/table_files.h"

namespace keepset::service::etcd {
namespace {

using testing::HasSubstr;

const std::string kDigest = absl::StrCat("sha256:", std::string(64, 'a'));

TEST(EtcdLayout, NamesKeysBelowThePrefix) {
  for (const char* prefix : {"/keepset", "/keepset/"}) {
    const Layout layout(prefix);
    EXPECT_EQ(layout.TableKey("qwen", "2026-11-22.1"), "/keepset/tables/qwen/2026-11-22.1");
    EXPECT_EQ(layout.SignatureKey("qwen", "1"), "/keepset/signatures/qwen/1");
    EXPECT_EQ(layout.LineKey("qwen"), "/keepset/lines/qwen");
  }
}

TEST(EtcdLayout, ReadsItsKeysBack) {
  const Layout layout("/keepset");
  const auto table = layout.Parse(layout.TableKey("org/model", "a/b"));
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(table->kind, Key::Kind::kTable);
  EXPECT_EQ(table->name, "org/model");
  EXPECT_EQ(table->version, "a/b");
  const auto signature = layout.Parse(layout.SignatureKey("org/model", "a/b"));
  ASSERT_TRUE(signature.ok()) << signature.status();
  EXPECT_EQ(signature->kind, Key::Kind::kSignature);
  EXPECT_EQ(signature->version, "a/b");
  const auto line = layout.Parse(layout.LineKey("org/model"));
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->kind, Key::Kind::kLine);
  EXPECT_EQ(line->name, "org/model");
}

TEST(EtcdLayout, RefusesOtherKeys) {
  const Layout layout("/k");
  for (const char* key : {"/k/", "/k/tables/", "/k/tables/a", "/k/tables/a/", "/k/tables//1",
                          "/k/tables/a/1/2", "/k/lines/", "/k/lines/a/b", "/k/other"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(layout.Parse(key).status())) << key;
  }
}

TEST(TablePointer, IsToldFromATableFile) {
  EXPECT_TRUE(IsTablePointer(R"({"digest": "x"})"));
  EXPECT_TRUE(IsTablePointer(" {\n}"));
  EXPECT_FALSE(IsTablePointer(fakes::TableBytes("a", "1")));
  // A header of 123 = '{' bytes.
  EXPECT_FALSE(IsTablePointer(absl::StrCat("{", std::string(7, '\0'), "{}")));
  EXPECT_FALSE(IsTablePointer(""));
}

TEST(TablePointer, ReadsWhatItWrote) {
  const auto pointer =
      ParseTablePointer(SerializeTablePointer({.digest = kDigest, .path = "a/b.safetensors"}), "k");
  ASSERT_TRUE(pointer.ok()) << pointer.status();
  EXPECT_EQ(pointer->digest, kDigest);
  EXPECT_EQ(pointer->path, "a/b.safetensors");
}

TEST(TablePointer, RefusesPathsOutsideTheVolume) {
  for (const char* path : {"", "/etc/passwd", "../a", "a/../b", "a//b"}) {
    const auto pointer = ParseTablePointer(SerializeTablePointer({kDigest, path}), "k");
    EXPECT_TRUE(absl::IsInvalidArgument(pointer.status())) << path;
  }
}

TEST(TablePointer, RefusesWhatIsNoDigestNamingTheKey) {
  for (const char* digest : {"", "sha256:", "sha256:ABC", "md5:00"}) {
    const auto pointer = ParseTablePointer(SerializeTablePointer({digest, "a"}), "/k/tables/a/1");
    EXPECT_TRUE(absl::IsInvalidArgument(pointer.status())) << digest;
    EXPECT_THAT(std::string(pointer.status().message()), HasSubstr("/k/tables/a/1: digest="));
  }
}

LineAssignment FullLine() {
  LineAssignment line;
  line.mode = LineMode::kChosen;
  line.active = TableTarget{"2", kDigest};
  line.canary = Canary{.target = {"3", kDigest}, .basis_points = 1234, .salt = "salt"};
  line.aliases["night"] = {"1", kDigest};
  line.history.push_back({.target = {"1", kDigest},
                          .time = absl::FromUnixMillis(1'700'000'000'123),
                          .actor = "ops",
                          .cause = "activate",
                          .undone = true});
  line.history.push_back({.target = {"2", kDigest},
                          .time = absl::FromUnixMillis(1'700'000'001'000),
                          .actor = "",
                          .cause = "rollback"});
  return line;
}

TEST(EtcdLine, ReadsWhatItWrote) {
  for (const LineAssignment& line : {FullLine(), LineAssignment{}}) {
    const auto read = ParseLine(SerializeLine(line), "k");
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_TRUE(*read == line) << SerializeLine(*read);
  }
}

TEST(EtcdLine, KeepsEveryHundredthOfAPercent) {
  for (int basis_points = 1; basis_points <= 10000; ++basis_points) {
    LineAssignment line = FullLine();
    line.canary->basis_points = basis_points;
    const auto read = ParseLine(SerializeLine(line), "k");
    ASSERT_TRUE(read.ok()) << read.status();
    ASSERT_EQ(read->canary->basis_points, basis_points);
  }
}

TEST(EtcdLine, TakesWhatAnOperatorWritesByHand) {
  const auto line = ParseLine(R"({"stable": {"version": "2"}, "note": "rolled out by hand"})", "k");
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->mode, LineMode::kChosen);
  EXPECT_TRUE(*line->active == (TableTarget{"2", ""}));
  EXPECT_FALSE(line->canary.has_value());
}

TEST(EtcdLine, RefusesGarbageNamingTheField) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "k"},
      {"garbage", "k"},
      {"[]", "want a JSON object"},
      {R"({"stable": "2"})", "stable="},
      {R"({"stable": {}})", "stable: version"},
      {R"({"stable": {"version": "2", "digest": "x"}})", "stable: digest="},
      {R"({"canary": {"version": "2", "percent": 0}})", "canary: percent="},
      {R"({"canary": {"version": "2", "percent": 100.5}})", "canary: percent="},
      {R"({"aliases": {"stable": {"version": "2"}}})", "aliases.stable"},
      {R"({"aliases": {"x": 1}})", "aliases.x="},
      {R"({"mode": "oldest"})", "mode="},
      {R"({"history": [{"version": "1", "time": "yesterday"}]})", "history[0]: time="},
      {R"({"history": [1]})", "history[0]"},
      {R"({"stable": null, "stable": null})", "k"},
  };
  for (const auto& [text, part] : cases) {
    const absl::Status status = ParseLine(text, "k").status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(part)) << text;
  }
}

TEST(EtcdLine, KeepsTheNewestOfALongHistory) {
  LineAssignment line;
  for (size_t i = 0; i < kMaxHistory + 3; ++i) {
    Activation activation;
    activation.target = {absl::StrCat(i), kDigest};
    line.history.push_back(activation);
  }
  const auto read = ParseLine(SerializeLine(line), "k");
  ASSERT_TRUE(read.ok()) << read.status();
  ASSERT_EQ(read->history.size(), kMaxHistory);
  EXPECT_EQ(read->history.back().target.version, absl::StrCat(kMaxHistory + 2));
}

}  // namespace
}  // namespace keepset::service::etcd
