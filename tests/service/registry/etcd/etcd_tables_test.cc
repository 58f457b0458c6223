#include "service/registry/etcd/etcd_tables.h"

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/table_files.h"

namespace keepset::service::etcd {
namespace {

using fakes::DigestOf;
using fakes::TableBytes;
using testing::HasSubstr;

constexpr const char* kTableA1 = "/k/tables/a/1";
constexpr const char* kTableA2 = "/k/tables/a/2";
constexpr const char* kLineA = "/k/lines/a";

Change Put(const std::string& key, const std::string& value, int64_t revision) {
  return {Change::Kind::kPut, {key, value, revision}};
}

Change Delete(const std::string& key, int64_t revision) {
  return {Change::Kind::kDelete, {key, "", revision}};
}

std::string Stable(const std::string& version) {
  return absl::StrCat(R"({"stable": {"version": ")", version, R"("}})");
}

class EtcdTablesTest : public testing::Test {
 protected:
  EtcdTables NewTables(int64_t max_value_bytes = 1 << 20) {
    return {
        {.prefix = "/k", .max_value_bytes = max_value_bytes, .shared_directory = shared_.path()},
        *loader_};
  }

  std::string Pointer(const std::string& path, const std::string& bytes) {
    return SerializeTablePointer({.digest = DigestOf(bytes), .path = path});
  }

  const fakes::ScratchDirectory shared_;
  const std::unique_ptr<TableLoader> loader_ = NewTableLoader();
};

TEST_F(EtcdTablesTest, GivesTablesAndWhatWasDecided) {
  EtcdTables tables = NewTables();
  tables.Apply(
      {Put(kTableA1, TableBytes("a", "1"), 5), Put(kLineA, R"({"stable": {"version": "1"}})", 5)});
  const SourceSet set = tables.Set({});
  EXPECT_EQ(set.rule, ActivationRule::kOnRequest);
  ASSERT_EQ(set.tables.size(), 1);
  EXPECT_EQ(set.tables[0].origin, kTableA1);
  EXPECT_TRUE(set.failures.empty());
  const LineAssignment& line = set.assignments.at("a");
  EXPECT_TRUE(*line.active == (TableTarget{"1", DigestOf(TableBytes("a", "1"))}));
}

TEST_F(EtcdTablesTest, NumbersALineByTheNewestOfItsKeys) {
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, TableBytes("a", "1"), 5), Put(kLineA, Stable("1"), 7),
                Put("/k/signatures/a/1", "signature", 6), Put("/k/tables/b/1", "damaged", 9)});
  const SourceSet set = tables.Set({});
  ASSERT_TRUE(set.shared.has_value());
  EXPECT_EQ(set.shared->revision, 9);
  EXPECT_EQ(set.shared->lines.at("a"), 7);
  EXPECT_EQ(set.shared->lines.at("b"), 9);
}

TEST_F(EtcdTablesTest, NumbersWhatIsLeftAsAServerThatReadsItWhole) {
  EtcdTables followed = NewTables();
  followed.Apply({Put(kTableA1, TableBytes("a", "1"), 5), Put(kTableA2, TableBytes("a", "2"), 8)});
  followed.Apply({Delete(kTableA2, 9)});
  EtcdTables read = NewTables();
  read.Replace({.revision = 30, .pairs = {{kTableA1, TableBytes("a", "1"), 5}}});
  EXPECT_EQ(followed.Set({}).shared, read.Set({}).shared);
}

TEST_F(EtcdTablesTest, DecidesNothingForLinesEtcdSaysNothingAbout) {
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, TableBytes("a", "1"), 5)});
  const SourceSet set = tables.Set({"gone"});
  for (const char* name : {"a", "gone"}) {
    EXPECT_FALSE(set.assignments.at(name).active.has_value()) << name;
  }
}

TEST_F(EtcdTablesTest, KeepsTheLastGoodTableOfADamagedValue) {
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, TableBytes("a", "1"), 5)});
  tables.Apply({Put(kTableA1, TableBytes("a", "1").substr(0, 100), 6)});
  SourceSet set = tables.Set({});
  ASSERT_EQ(set.tables.size(), 1);
  EXPECT_EQ(set.tables[0].table->identity().digest, DigestOf(TableBytes("a", "1")));
  ASSERT_EQ(set.failures.size(), 1);
  EXPECT_EQ(set.failures[0].origin, kTableA1);
  EXPECT_EQ(set.failures[0].instance, "6");
  EXPECT_EQ(set.failures[0].version, "1");
  tables.Apply({Put(kTableA1, TableBytes("a", "1", 1.25f), 7)});
  set = tables.Set({});
  EXPECT_TRUE(set.failures.empty());
  EXPECT_EQ(set.tables[0].table->identity().digest, DigestOf(TableBytes("a", "1", 1.25f)));
}

TEST_F(EtcdTablesTest, KeepsTheLastGoodLineOfGarbage) {
  EtcdTables tables = NewTables();
  tables.Apply(
      {Put(kTableA1, TableBytes("a", "1"), 5), Put(kLineA, R"({"stable": {"version": "1"}})", 5)});
  tables.Apply({Put(kLineA, "{garbage", 6)});
  const SourceSet set = tables.Set({});
  EXPECT_EQ(set.assignments.at("a").active->version, "1");
  ASSERT_EQ(set.failures.size(), 1);
  EXPECT_THAT(std::string(set.failures[0].why.message()), HasSubstr(kLineA));
}

TEST_F(EtcdTablesTest, RefusesValuesOverTheLimitSayingWhatToDo) {
  EtcdTables tables = NewTables(/*max_value_bytes=*/100);
  tables.Apply({Put(kTableA1, TableBytes("a", "1"), 5)});
  const SourceSet set = tables.Set({});
  EXPECT_TRUE(set.tables.empty());
  ASSERT_EQ(set.failures.size(), 1);
  EXPECT_THAT(std::string(set.failures[0].why.message()), HasSubstr("max_value_bytes"));
}

TEST_F(EtcdTablesTest, RefusesATableUnderAnotherTablesKey) {
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA2, TableBytes("a", "1"), 5)});
  const SourceSet set = tables.Set({});
  EXPECT_TRUE(set.tables.empty());
  ASSERT_EQ(set.failures.size(), 1);
  EXPECT_THAT(std::string(set.failures[0].why.message()), HasSubstr(kTableA1));
}

TEST_F(EtcdTablesTest, ReportsKeysItDoesNotKnow) {
  EtcdTables tables = NewTables();
  tables.Apply({Put("/k/tables/a", "x", 5)});
  ASSERT_EQ(tables.Set({}).failures.size(), 1);
  tables.Apply({Delete("/k/tables/a", 6)});
  EXPECT_TRUE(tables.Set({}).failures.empty());
}

TEST_F(EtcdTablesTest, ReadsAFileOfTheSharedVolume) {
  const std::string bytes = TableBytes("a", "1");
  std::filesystem::create_directory(shared_ / "sub");
  fakes::WriteInPlace(shared_ / "sub/a.safetensors", bytes);
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, Pointer("sub/a.safetensors", bytes), 5)});
  const SourceSet set = tables.Set({});
  ASSERT_EQ(set.tables.size(), 1) << set.failures[0].why;
  EXPECT_EQ(set.tables[0].table->identity().digest, DigestOf(bytes));
}

TEST_F(EtcdTablesTest, RefusesAFileOfAnotherDigestUntilItIsTheRightOne) {
  const std::string bytes = TableBytes("a", "1");
  fakes::WriteInPlace(shared_ / "a.safetensors", TableBytes("a", "1", 1.25f));
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, Pointer("a.safetensors", bytes), 5)});
  const SourceSet set = tables.Set({});
  EXPECT_TRUE(set.tables.empty());
  ASSERT_EQ(set.failures.size(), 1);
  EXPECT_THAT(std::string(set.failures[0].why.message()), HasSubstr(DigestOf(bytes)));
  EXPECT_TRUE(tables.has_missing_files());
  EXPECT_FALSE(tables.RetryFiles());
  fakes::WriteAndRename(shared_ / "a.safetensors", bytes);
  EXPECT_TRUE(tables.RetryFiles());
  EXPECT_FALSE(tables.has_missing_files());
  EXPECT_EQ(tables.Set({}).tables.size(), 1);
  EXPECT_TRUE(tables.Set({}).failures.empty());
}

TEST_F(EtcdTablesTest, WaitsForAFileThatIsStillOnItsWay) {
  const std::string bytes = TableBytes("a", "1");
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, Pointer("late.safetensors", bytes), 5)});
  EXPECT_EQ(tables.Set({}).failures.size(), 1);
  EXPECT_TRUE(tables.has_missing_files());
  fakes::WriteAndRename(shared_ / "late.safetensors", bytes);
  EXPECT_TRUE(tables.RetryFiles());
  EXPECT_EQ(tables.Set({}).tables.size(), 1);
}

TEST_F(EtcdTablesTest, RefusesFilesWhereThereIsNoSharedVolume) {
  EtcdTables tables({.prefix = "/k", .max_value_bytes = 1000, .shared_directory = ""}, *loader_);
  tables.Apply({Put(kTableA1, Pointer("a", TableBytes("a", "1")), 5)});
  ASSERT_EQ(tables.Set({}).failures.size(), 1);
  EXPECT_THAT(std::string(tables.Set({}).failures[0].why.message()), HasSubstr("shared_directory"));
}

TEST_F(EtcdTablesTest, ReadAgainItHoldsWhatIsThereAndNothingElse) {
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, TableBytes("a", "1"), 5), Put(kTableA2, TableBytes("a", "2"), 6),
                Put(kLineA, R"({"stable": {"version": "1"}})", 7)});
  const TablePtr before = tables.Set({}).tables[0].table;
  tables.Replace({.cluster_id = 1, .revision = 9, .pairs = {{kTableA1, TableBytes("a", "1"), 8}}});
  const SourceSet set = tables.Set({});
  ASSERT_EQ(set.tables.size(), 1);
  EXPECT_EQ(set.tables[0].table, before) << "the same content is the same object";
  EXPECT_FALSE(set.assignments.at("a").active.has_value());
}

TEST_F(EtcdTablesTest, TrustsNoRevisionOfAnotherCluster) {
  EtcdTables tables = NewTables();
  tables.Replace({.cluster_id = 1, .revision = 5, .pairs = {{kTableA1, TableBytes("a", "1"), 5}}});
  const std::string other = TableBytes("a", "1", 1.25f);
  tables.Replace({.cluster_id = 2, .revision = 5, .pairs = {{kTableA1, other, 5}}});
  EXPECT_EQ(tables.Set({}).tables.at(0).table->identity().digest, DigestOf(other));
}

TEST_F(EtcdTablesTest, KnowsRevisionsForConditionalWrites) {
  EtcdTables tables = NewTables();
  tables.Apply({Put(kTableA1, TableBytes("a", "1"), 5), Put(kLineA, "damaged", 6)});
  EXPECT_EQ(tables.Revisions(), (std::map<std::string, int64_t>{{kTableA1, 5}, {kLineA, 6}}));
}

}  // namespace
}  // namespace keepset::service::etcd
