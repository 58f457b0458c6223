#include "tables/table_store.h"

#include <atomic>
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
  EXPECT_EQ((*table)->identity().name, "b");
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
  EXPECT_THAT(std::string(table.status().message()), HasSubstr("no active table"));
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
  EXPECT_EQ((*ResolveTable(*store.Snapshot(), query))->identity().name, "b");
}

TEST(ResolveTable, ADigestPinsTheTable) {
  TableStore store;
  store.Publish({Named("a", "1", SmallModel()), Named("b", "1", SmallModel())});
  TableQuery query = QueryFor(SmallModel());
  query.digest = store.Snapshot()->tables[1]->identity().digest;
  EXPECT_EQ((*ResolveTable(*store.Snapshot(), query))->identity().name, "b");
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

}  // namespace
}  // namespace keepset::tables
