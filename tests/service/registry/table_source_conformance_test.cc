// What every source of sources.def owes (table_origin.h: how tables come to it), and what a source
// of files owes beside that.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/registry/source_registry.h"
#include "service/registry/state_directory.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"
#include "tests/fakes/fake_registry_observer.h"
#include "tests/fakes/table_files.h"
#include "tests/service/registry/table_origin.h"

namespace keepset::service {
namespace {

using testing::HasSubstr;

class TableSourceTest : public testing::TestWithParam<std::string> {
 protected:
  // A server's tables: store, registry and one source. Ends with the source first.
  struct Host {
    tables::TableStore store;
    fakes::FakeRegistryObserver observer;
    std::unique_ptr<TableLoader> loader;
    std::unique_ptr<TableRegistry> registry;
    std::unique_ptr<TableSource> source;
  };

  std::unique_ptr<Host> NewHost(StateDirectory* state = nullptr) {
    auto host = std::make_unique<Host>();
    host->loader = state == nullptr ? NewTableLoader() : NewMappingTableLoader(*state);
    auto registry = TableRegistry::New({.store = &host->store,
                                        .clock = &SystemClock(),
                                        .observer = &host->observer,
                                        .state = state,
                                        .sources = {GetParam()}});
    EXPECT_TRUE(registry.ok()) << registry.status();
    host->registry = *std::move(registry);
    auto source = NewTableSource(
        GetParam(), origin_->Options(),
        {.registry = *host->registry, .loader = *host->loader, .clock = SystemClock()});
    EXPECT_TRUE(source.ok()) << source.status();
    host->source = *std::move(source);
    return host;
  }

  const std::unique_ptr<TableOrigin> origin_ = NewTableOrigin(GetParam());
  const std::unique_ptr<Host> host_ = NewHost();
  tables::TableStore& store_ = host_->store;
  fakes::FakeRegistryObserver& observer_ = host_->observer;
  const std::unique_ptr<TableSource>& source_ = host_->source;
};

TEST_P(TableSourceTest, NamesItsKind) { EXPECT_EQ(source_->kind(), GetParam()); }

TEST_P(TableSourceTest, PublishesWhatIsThereBeforeStartReturns) {
  origin_->Place("a", fakes::TableBytes("a", "1"));
  ASSERT_TRUE(source_->Start().ok());
  ASSERT_EQ(store_.Snapshot()->tables.size(), 1);
  EXPECT_EQ(store_.Snapshot()->tables[0]->identity().name, "a");
}

TEST_P(TableSourceTest, RefusesToStartTwice) {
  ASSERT_TRUE(source_->Start().ok());
  EXPECT_EQ(source_->Start().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_P(TableSourceTest, StopsTwiceAndWithoutAStart) {
  source_->Stop();
  ASSERT_TRUE(source_->Start().ok());
  source_->Stop();
  source_->Stop();
}

TEST_P(TableSourceTest, PublishesAReplacedTableAndKeepsTheOldSnapshotAlive) {
  origin_->Place("a", fakes::TableBytes("a", "1"));
  ASSERT_TRUE(source_->Start().ok());
  const auto before = store_.Snapshot();
  origin_->Place("a", fakes::TableBytes("a", "2"));
  ASSERT_TRUE(observer_.WaitForVersions({"2"}));
  EXPECT_EQ(before->tables[0]->identity().version, "1");
  EXPECT_EQ(store_.Snapshot()->tables[0]->identity().version, "2");
  EXPECT_GT(store_.Snapshot()->revision, before->revision);
}

TEST_P(TableSourceTest, KeepsTheLastGoodTableOfADamagedFile) {
  origin_->Place("a", fakes::TableBytes("a", "1"));
  ASSERT_TRUE(source_->Start().ok());
  origin_->Place("a", fakes::TableBytes("a", "2").substr(0, 100));
  ASSERT_TRUE(observer_.WaitForRefusals(1));
  EXPECT_EQ(store_.Snapshot()->tables.at(0)->identity().version, "1");
  EXPECT_THAT(std::string(observer_.refused()[0].why.message()), HasSubstr(origin_->PlaceOf("a")));
  origin_->Place("a", fakes::TableBytes("a", "3"));
  EXPECT_TRUE(observer_.WaitForVersions({"3"}));
}

TEST_P(TableSourceTest, PublishesGoodTablesBesideADamagedOneAtStart) {
  origin_->Place("a", "no table");
  origin_->Place("b", fakes::TableBytes("b", "1"));
  ASSERT_TRUE(source_->Start().ok());
  EXPECT_EQ(store_.Snapshot()->tables.size(), 1);
  EXPECT_EQ(observer_.refused().size(), 1);
}

TEST_P(TableSourceTest, RecoversTheSetAfterARestart) {
  origin_->Place("a", fakes::TableBytes("a", "1"));
  origin_->Place("b", fakes::TableBytes("b", "1"));
  ASSERT_TRUE(source_->Start().ok());
  source_->Stop();
  origin_->Place("b", fakes::TableBytes("b", "2"));
  const std::unique_ptr<Host> next = NewHost();
  ASSERT_TRUE(next->source->Start().ok());
  EXPECT_TRUE(next->observer.WaitForVersions({"1", "2"}));
}

TEST_P(TableSourceTest, ServesTheActiveSetAfterARestartBeforeTheSourceAnswers) {
  const fakes::ScratchDirectory kept;
  origin_->Place("a", fakes::TableBytes("a", "1"));
  {
    const auto state = *StateDirectory::Open(kept / "state");
    const std::unique_ptr<Host> first = NewHost(state.get());
    ASSERT_TRUE(first->source->Start().ok());
    ASSERT_TRUE(first->observer.WaitForVersions({"1"}));
  }
  origin_->Place("a", fakes::TableBytes("a", "2"));
  const auto state = *StateDirectory::Open(kept / "state");
  const std::unique_ptr<Host> next = NewHost(state.get());
  ASSERT_EQ(next->store.Snapshot()->tables.size(), 1);
  EXPECT_EQ(next->store.Snapshot()->tables[0]->identity().version, "1");
  ASSERT_TRUE(next->source->Start().ok());
  EXPECT_TRUE(next->observer.WaitForVersions({"2"}));
}

TEST_P(TableSourceTest, RollsBackToWhatAFileHeldBefore) {
  origin_->Place("a", fakes::TableBytes("a", "1"));
  ASSERT_TRUE(source_->Start().ok());
  origin_->Place("a", fakes::TableBytes("a", "2"));
  ASSERT_TRUE(observer_.WaitForVersions({"2"}));
  const absl::StatusOr<WriteReceipt> receipt = host_->registry->Rollback("a", {});
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->previous_version, "2");
  EXPECT_EQ(store_.Snapshot()->tables.at(0)->identity().version, "1");
}

// Two tables whose files have one length and differ in every tensor byte and nowhere else: any
// mixture of the two is a valid table, told from them by its digest alone.
struct TornPair {
  static constexpr size_t kTailBytes = 24;  // cuts through the head weights

  std::string bytes[2] = {fakes::TableBytes("t", "1", 1.0f, 0.9f),
                          fakes::TableBytes("t", "1", 1.25f, 0.8f)};
  std::string digests[2] = {fakes::DigestOf(bytes[0]), fakes::DigestOf(bytes[1])};
};

void ExpectOnlyWholeTables(const fakes::FakeRegistryObserver& observer, const TornPair& pair) {
  for (const auto& set : observer.published()) {
    for (const tables::TableIdentity& table : set) {
      if (table.name != "t") continue;
      EXPECT_THAT(table.digest, testing::AnyOf(pair.digests[0], pair.digests[1]));
    }
  }
}

TEST(TornPair, MixesToAValidTableThatIsNeither) {
  const TornPair pair;
  ASSERT_EQ(pair.bytes[0].size(), pair.bytes[1].size());
  const size_t half = pair.bytes[0].size() - TornPair::kTailBytes;
  const std::string mixture =
      fakes::DigestOf(pair.bytes[0].substr(0, half) + pair.bytes[1].substr(half));
  EXPECT_NE(mixture, "");
  EXPECT_NE(mixture, pair.digests[0]);
  EXPECT_NE(mixture, pair.digests[1]);
}

class FileSourceTest : public TableSourceTest {
 protected:
  // Of the directory the source watches.
  std::string PathOf(const std::string& table) const {
    return absl::StrCat(origin_->Options().directory.directory, "/", origin_->PlaceOf(table));
  }
};

TEST_P(FileSourceTest, PublishesNoMixtureWhileAWriterPausesHalfWay) {
  const TornPair pair;
  const std::string path = PathOf("t");
  fakes::WriteInPlace(path, pair.bytes[0]);
  ASSERT_TRUE(source_->Start().ok());

  constexpr int kRounds = 100;
  for (int round = 1; round <= kRounds; ++round) {
    const std::string& next = pair.bytes[round % 2];
    const int writer = open(path.c_str(), O_WRONLY | O_CLOEXEC);
    ASSERT_GE(writer, 0);
    const size_t half = next.size() - TornPair::kTailBytes;
    ASSERT_EQ(pwrite(writer, next.data(), half, 0), half);
    // The source has looked at the directory in the middle of the write once it shows this one.
    const std::string version = absl::StrCat("m", round);
    origin_->Place("m", fakes::TableBytes("m", version));
    ASSERT_TRUE(observer_.WaitForVersions({version, "1"}));
    ASSERT_EQ(pwrite(writer, next.data() + half, TornPair::kTailBytes, half), TornPair::kTailBytes);
    close(writer);
    ASSERT_TRUE(observer_.WaitForDigest("t", pair.digests[round % 2])) << "round " << round;
  }
  ExpectOnlyWholeTables(observer_, pair);
}

TEST_P(FileSourceTest, PublishesNoMixtureOfAWriterThatNeverWaits) {
  const TornPair pair;
  const std::string path = PathOf("t");
  fakes::WriteInPlace(path, pair.bytes[0]);
  ASSERT_TRUE(source_->Start().ok());

  constexpr int kRounds = 400;
  std::thread writer([&] {
    for (int round = 1; round <= kRounds; ++round) {
      const std::string& next = pair.bytes[round % 2];
      const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
      for (size_t at = 0; at < next.size(); at += 8) {
        const size_t size = std::min<size_t>(8, next.size() - at);
        EXPECT_EQ(pwrite(fd, next.data() + at, size, at), size);
        std::this_thread::yield();
      }
      close(fd);
    }
  });
  writer.join();
  EXPECT_TRUE(observer_.WaitForDigest("t", pair.digests[kRounds % 2]));
  ExpectOnlyWholeTables(observer_, pair);
}

INSTANTIATE_TEST_SUITE_P(SourcesOfFiles, FileSourceTest, testing::Values("directory"),
                         [](const auto& info) { return info.param; });
INSTANTIATE_TEST_SUITE_P(EverySource, TableSourceTest, testing::ValuesIn(ListTableSources()),
                         [](const auto& info) { return info.param; });

TEST(NewTableSource, RefusesAnUnknownKindNamingTheKnown) {
  tables::TableStore store;
  const auto registry = *TableRegistry::New({.store = &store, .clock = &SystemClock()});
  const auto loader = NewTableLoader();
  const absl::Status status =
      NewTableSource("tape", {}, {.registry = *registry, .loader = *loader, .clock = SystemClock()})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("directory"));
}

}  // namespace
}  // namespace keepset::service
