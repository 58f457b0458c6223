#include "tables/table_store.h"

#include <atomic>
#include <cmath>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/table_file.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::HasSubstr;

std::shared_ptr<const DecisionTable> Named(const std::string& name, const std::string& version,
                                           const ModelFingerprint& model) {
  CompilerKvTableContent content = UniformTable(model, 1.0f, 0.9f);
  content.name = name;
  content.version = version;
  return *ParseTable(AsBytes(*SerializeTable(content)), name);
}

TableQuery QueryFor(const ModelFingerprint& model) {
  TableQuery query;
  query.model = model;
  return query;
}

TEST(TableStore, BeginsEmptyAtRevisionZero) {
  const TableStore store;
  EXPECT_EQ(store.Snapshot()->revision, 0);
  EXPECT_TRUE(store.Snapshot()->tables.empty());
}

TEST(TableStore, PublishReplacesTheSetAndCountsUp) {
  TableStore store;
  EXPECT_EQ(store.Publish({Named("b", "1", SmallModel()), Named("a", "1", SmallModel())}), 1);
  EXPECT_EQ(store.Snapshot()->tables[0]->identity().name, "a");
  EXPECT_EQ(store.Publish({}), 2);
  EXPECT_TRUE(store.Snapshot()->tables.empty());
}

TEST(TableStore, ASnapshotKeepsItsTablesAfterAPublish) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel())});
  const auto before = store.Snapshot();
  store.Publish({Named("a", "2", SmallModel())});
  EXPECT_EQ(before->tables[0]->identity().version, "1");
}

TEST(TableStore, ReadersSeeWholeSetsWhileOthersPublish) {
  TableStore store;
  const std::vector<std::shared_ptr<const DecisionTable>> sets[2] = {
      {Named("a", "1", SmallModel()), Named("b", "1", SmallModel())},
      {Named("a", "2", SmallModel()), Named("b", "2", SmallModel())}};
  store.Publish(sets[0]);
  std::atomic<bool> done = false;
  std::atomic<int> mixed = 0;
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      uint64_t newest = 0;
      while (!done.load()) {
        const auto snapshot = store.Snapshot();
        if (snapshot->revision < newest) ++mixed;
        newest = snapshot->revision;
        if (snapshot->tables[0]->identity().version != snapshot->tables[1]->identity().version) {
          ++mixed;
        }
      }
    });
  }
  for (int i = 0; i < 2000; ++i) store.Publish(sets[i % 2]);
  done = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(mixed.load(), 0);
  EXPECT_EQ(store.Snapshot()->revision, 2001);
}

TEST(ResolveTable, FindsTheOnlyTableThatFits) {
  TableStore store;
  ModelFingerprint other = SmallModel();
  other.num_layers = 3;
  store.Publish({Named("a", "1", SmallModel()), Named("b", "1", other)});
  const auto table = ResolveTable(*store.Snapshot(), QueryFor(other));
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(table->table->identity().name, "b");
}

TEST(ResolveTable, UnknownIdentityIsNotFoundAndListsWhatThereIs) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel())});
  TableQuery query = QueryFor(SmallModel());
  for (std::string TableQuery::*field :
       {&TableQuery::name, &TableQuery::version, &TableQuery::digest, &TableQuery::kind}) {
    TableQuery wrong = query;
    wrong.*field = "other";
    const auto table = ResolveTable(*store.Snapshot(), wrong);
    EXPECT_EQ(table.status().code(), absl::StatusCode::kNotFound);
    EXPECT_THAT(std::string(table.status().message()), HasSubstr("a@1"));
  }
}

TEST(ResolveTable, AnEmptyStoreSaysSo) {
  const TableStore store;
  const auto table = ResolveTable(*store.Snapshot(), QueryFor(SmallModel()));
  EXPECT_EQ(table.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(table.status().message()), HasSubstr("no table is active"));
}

TEST(ResolveTable, AMisfitNamesTheField) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel())});
  ModelFingerprint model = SmallModel();
  model.head_dim = 16;
  const auto table = ResolveTable(*store.Snapshot(), QueryFor(model));
  EXPECT_EQ(table.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(table.status().message()),
              HasSubstr("head_dim is 8 in the table and 16 in the request"));
}

TEST(ResolveTable, SeveralFittingTablesNeedAName) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel()), Named("b", "1", SmallModel())});
  TableQuery query = QueryFor(SmallModel());
  EXPECT_EQ(ResolveTable(*store.Snapshot(), query).status().code(),
            absl::StatusCode::kFailedPrecondition);
  query.name = "b";
  EXPECT_EQ(ResolveTable(*store.Snapshot(), query)->table->identity().name, "b");
}

TEST(ResolveTable, ADigestPinsTheTable) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel()), Named("b", "1", SmallModel())});
  TableQuery query = QueryFor(SmallModel());
  query.digest = store.Snapshot()->tables[1]->identity().digest;
  EXPECT_EQ(ResolveTable(*store.Snapshot(), query)->table->identity().name, "b");
}

TEST(ResolveTable, RelaxationsLetOtherDepthsAndNamesFit) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel())});
  TableQuery query = QueryFor(SmallModel());
  query.model.num_layers = 5;
  EXPECT_FALSE(ResolveTable(*store.Snapshot(), query).ok());
  query.layer_match = LayerMatch::kInterpolateDepth;
  EXPECT_TRUE(ResolveTable(*store.Snapshot(), query).ok());
  query.model.architecture = "qwen2";
  EXPECT_FALSE(ResolveTable(*store.Snapshot(), query).ok());
  query.fingerprint_match = FingerprintMatch::kShape;
  EXPECT_TRUE(ResolveTable(*store.Snapshot(), query).ok());
}

// A line "a" with an active version 1 and a loaded version 2.
TableSnapshot TwoVersions() {
  TableSnapshot snapshot;
  snapshot.revision = 1;
  snapshot.tables = {Named("a", "1", SmallModel())};
  snapshot.loaded = {snapshot.tables[0], Named("a", "2", SmallModel())};
  return snapshot;
}

TableSnapshot WithCanary(int basis_points) {
  TableSnapshot snapshot = TwoVersions();
  snapshot.roles["a"] = {.canary = snapshot.loaded[1],
                         .canary_basis_points = basis_points,
                         .canary_salt = "salt",
                         .aliases = {}};
  return snapshot;
}

TEST(ResolveTable, AVersionThatIsOnlyLoadedAnswersThosePinningIt) {
  const TableSnapshot snapshot = TwoVersions();
  TableQuery query = QueryFor(SmallModel());
  EXPECT_EQ(ResolveTable(snapshot, query)->table->identity().version, "1");
  EXPECT_EQ(ResolveTable(snapshot, query)->selection, TableSelection::kActive);
  query.version = "2";
  EXPECT_EQ(ResolveTable(snapshot, query)->table->identity().version, "2");
  EXPECT_EQ(ResolveTable(snapshot, query)->selection, TableSelection::kPinned);
}

TEST(ResolveTable, ANameAloneIsAnsweredByTheActiveVersion) {
  TableQuery query = QueryFor(SmallModel());
  query.name = "a";
  EXPECT_EQ(ResolveTable(TwoVersions(), query)->table->identity().version, "1");
}

TEST(ResolveTable, AliasesNameVersionsOfTheLine) {
  TableSnapshot snapshot = WithCanary(1);
  snapshot.roles["a"].aliases["next"] = snapshot.loaded[1];
  TableQuery query = QueryFor(SmallModel());
  for (const auto& [alias, version] :
       {std::pair("stable", "1"), std::pair("canary", "2"), std::pair("next", "2")}) {
    query.alias = alias;
    const auto resolved = ResolveTable(snapshot, query);
    ASSERT_TRUE(resolved.ok()) << resolved.status();
    EXPECT_EQ(resolved->table->identity().version, version) << alias;
    EXPECT_EQ(resolved->selection, TableSelection::kPinned);
  }
  query.alias = "none";
  EXPECT_EQ(ResolveTable(snapshot, query).status().code(), absl::StatusCode::kNotFound);
}

TEST(ResolveTable, AnAliasOfAnotherLineIsNotFound) {
  TableSnapshot snapshot = WithCanary(1);
  snapshot.roles["a"].aliases["next"] = snapshot.loaded[1];
  TableQuery query = QueryFor(SmallModel());
  query.name = "b";
  query.alias = "next";
  EXPECT_EQ(ResolveTable(snapshot, query).status().code(), absl::StatusCode::kNotFound);
}

TEST(ResolveTable, ACanaryGetsItsShareAndEachRequestKeepsItsSide) {
  const TableSnapshot snapshot = WithCanary(1000);
  TableQuery query = QueryFor(SmallModel());
  int canary = 0;
  constexpr int kRequests = 20000;
  for (int i = 0; i < kRequests; ++i) {
    query.request_id = absl::StrCat("request-", i);
    const auto first = ResolveTable(snapshot, query);
    EXPECT_EQ(first->table, ResolveTable(snapshot, query)->table);
    EXPECT_EQ(first->selection == TableSelection::kCanary, first->table == snapshot.loaded[1]);
    canary += first->selection == TableSelection::kCanary ? 1 : 0;
  }
  // Five standard deviations of a binomial share of 0.1.
  EXPECT_NEAR(canary, 0.1 * kRequests, 5 * std::sqrt(kRequests * 0.1 * 0.9));
}

TEST(ResolveTable, AGrowingCanaryKeepsTheRequestsItHas) {
  TableQuery query = QueryFor(SmallModel());
  for (int i = 0; i < 2000; ++i) {
    query.request_id = absl::StrCat(i);
    if (ResolveTable(WithCanary(500), query)->selection != TableSelection::kCanary) continue;
    EXPECT_EQ(ResolveTable(WithCanary(2500), query)->selection, TableSelection::kCanary);
  }
}

TEST(ResolveTable, AFullCanaryGetsEveryRequestThatHasAnId) {
  const TableSnapshot snapshot = WithCanary(10000);
  TableQuery query = QueryFor(SmallModel());
  EXPECT_EQ(ResolveTable(snapshot, query)->selection, TableSelection::kActive);
  for (int i = 0; i < 1000; ++i) {
    query.request_id = absl::StrCat(i);
    EXPECT_EQ(ResolveTable(snapshot, query)->selection, TableSelection::kCanary);
  }
}

TEST(ResolveTable, APinBeatsTheCanary) {
  const TableSnapshot snapshot = WithCanary(10000);
  TableQuery query = QueryFor(SmallModel());
  query.request_id = "any";
  query.version = "1";
  EXPECT_EQ(ResolveTable(snapshot, query)->table->identity().version, "1");
  query.version = "";
  query.alias = "stable";
  EXPECT_EQ(ResolveTable(snapshot, query)->table->identity().version, "1");
}

TEST(ResolveTable, SaysWhenTheTableFitsOnlyLoosely) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel())});
  TableQuery query = QueryFor(SmallModel());
  query.fingerprint_match = FingerprintMatch::kShape;
  EXPECT_FALSE(ResolveTable(*store.Snapshot(), query)->loose_match);
  query.model.architecture = "another";
  EXPECT_TRUE(ResolveTable(*store.Snapshot(), query)->loose_match);
}

// Fixed so that servers of a fleet, of whatever version, put a request on the same side.
TEST(CanaryBucket, NeverChanges) {
  EXPECT_EQ(CanaryBucket("", ""), 2267);
  EXPECT_EQ(CanaryBucket("salt", "request-1"), 8747);
  EXPECT_EQ(CanaryBucket("sal", "trequest-1"), 2940);
}

TEST(CanaryBucket, IsUniformOverSequentialIds) {
  int counts[10] = {};
  constexpr int kIds = 100000;
  for (int i = 0; i < kIds; ++i) ++counts[CanaryBucket("sha256:00", absl::StrCat(i)) / 1000];
  for (const int count : counts) {
    EXPECT_NEAR(count, kIds / 10, 5 * std::sqrt(kIds * 0.1 * 0.9));
  }
}

}  // namespace
}  // namespace keepset::tables
