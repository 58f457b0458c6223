// What every source of sources.def owes. A source that takes no directory brings its own way to
// put a table in place.
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
#include "tests/fakes/fake_table_source_observer.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

using testing::HasSubstr;

class TableSourceTest : public testing::TestWithParam<std::string> {
 protected:
  std::unique_ptr<TableSource> NewSource(tables::TableStore& store, TableSourceObserver* observer) {
    DirectorySourceOptions options;
    options.directory = directory_.path();
    options.debounce = absl::Milliseconds(1);
    auto source = NewTableSource(GetParam(), options, store, SystemClock(), observer);
    EXPECT_TRUE(source.ok()) << source.status();
    return *std::move(source);
  }

  const fakes::ScratchDirectory directory_;
  tables::TableStore store_;
  fakes::FakeTableSourceObserver observer_;
};

TEST_P(TableSourceTest, NamesItsKind) { EXPECT_EQ(NewSource(store_, nullptr)->kind(), GetParam()); }

TEST_P(TableSourceTest, PublishesWhatIsThereBeforeStartReturns) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("a", "1"));
  const auto source = NewSource(store_, &observer_);
  ASSERT_TRUE(source->Start().ok());
  ASSERT_EQ(store_.Snapshot()->tables.size(), 1);
  EXPECT_EQ(store_.Snapshot()->tables[0]->identity().name, "a");
}

TEST_P(TableSourceTest, RefusesToStartTwice) {
  const auto source = NewSource(store_, &observer_);
  ASSERT_TRUE(source->Start().ok());
  EXPECT_EQ(source->Start().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_P(TableSourceTest, StopsTwiceAndWithoutAStart) {
  const auto source = NewSource(store_, &observer_);
  source->Stop();
  ASSERT_TRUE(source->Start().ok());
  source->Stop();
  source->Stop();
}

TEST_P(TableSourceTest, PublishesAReplacedTableAndKeepsTheOldSnapshotAlive) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("a", "1"));
  const auto source = NewSource(store_, &observer_);
  ASSERT_TRUE(source->Start().ok());
  const auto before = store_.Snapshot();
  fakes::WriteAndRename(directory_ / "a.safetensors", fakes::TableBytes("a", "2"));
  ASSERT_TRUE(observer_.WaitForVersions({"2"}));
  EXPECT_EQ(before->tables[0]->identity().version, "1");
  EXPECT_EQ(store_.Snapshot()->tables[0]->identity().version, "2");
  EXPECT_GT(store_.Snapshot()->revision, before->revision);
}

TEST_P(TableSourceTest, KeepsTheLastGoodTableOfADamagedFile) {
  const std::string path = directory_ / "a.safetensors";
  fakes::WriteInPlace(path, fakes::TableBytes("a", "1"));
  const auto source = NewSource(store_, &observer_);
  ASSERT_TRUE(source->Start().ok());
  fakes::WriteAndRename(path, fakes::TableBytes("a", "2").substr(0, 100));
  ASSERT_TRUE(observer_.WaitForRefusals(1));
  EXPECT_EQ(store_.Snapshot()->tables.at(0)->identity().version, "1");
  EXPECT_THAT(std::string(observer_.refused()[0].why.message()), HasSubstr("a.safetensors"));
  fakes::WriteAndRename(path, fakes::TableBytes("a", "3"));
  EXPECT_TRUE(observer_.WaitForVersions({"3"}));
}

TEST_P(TableSourceTest, PublishesGoodTablesBesideADamagedOneAtStart) {
  fakes::WriteInPlace(directory_ / "a.safetensors", "no table");
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("b", "1"));
  const auto source = NewSource(store_, &observer_);
  ASSERT_TRUE(source->Start().ok());
  EXPECT_EQ(store_.Snapshot()->tables.size(), 1);
  EXPECT_EQ(observer_.refused().size(), 1);
}

TEST_P(TableSourceTest, RecoversTheSetAfterARestart) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("a", "1"));
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("b", "1"));
  {
    const auto source = NewSource(store_, &observer_);
    ASSERT_TRUE(source->Start().ok());
  }
  fakes::WriteAndRename(directory_ / "b.safetensors", fakes::TableBytes("b", "2"));
  tables::TableStore next_store;
  fakes::FakeTableSourceObserver next_observer;
  const auto next = NewSource(next_store, &next_observer);
  ASSERT_TRUE(next->Start().ok());
  EXPECT_TRUE(next_observer.WaitForVersions({"1", "2"}));
}

// Two tables whose files have one length and differ in every tensor byte and nowhere else: any
// mixture of the two is a valid table, told from them by its digest alone.
struct TornPair {
  static constexpr size_t kTailBytes = 24;  // cuts through the head weights

  std::string bytes[2] = {fakes::TableBytes("t", "1", 1.0f, 0.9f),
                          fakes::TableBytes("t", "1", 1.25f, 0.8f)};
  std::string digests[2] = {fakes::DigestOf(bytes[0]), fakes::DigestOf(bytes[1])};
};

void ExpectOnlyWholeTables(const fakes::FakeTableSourceObserver& observer, const TornPair& pair) {
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

TEST_P(TableSourceTest, PublishesNoMixtureWhileAWriterPausesHalfWay) {
  const TornPair pair;
  const std::string path = directory_ / "t.safetensors";
  fakes::WriteInPlace(path, pair.bytes[0]);
  const auto source = NewSource(store_, &observer_);
  ASSERT_TRUE(source->Start().ok());

  constexpr int kRounds = 100;
  for (int round = 1; round <= kRounds; ++round) {
    const std::string& next = pair.bytes[round % 2];
    const int writer = open(path.c_str(), O_WRONLY | O_CLOEXEC);
    ASSERT_GE(writer, 0);
    const size_t half = next.size() - TornPair::kTailBytes;
    ASSERT_EQ(pwrite(writer, next.data(), half, 0), half);
    // The source has looked at the directory in the middle of the write once it shows this one.
    const std::string version = absl::StrCat("m", round);
    fakes::WriteAndRename(directory_ / "m.safetensors", fakes::TableBytes("m", version));
    ASSERT_TRUE(observer_.WaitForVersions({version, "1"}));
    ASSERT_EQ(pwrite(writer, next.data() + half, TornPair::kTailBytes, half), TornPair::kTailBytes);
    close(writer);
    ASSERT_TRUE(observer_.WaitForDigest("t", pair.digests[round % 2])) << "round " << round;
  }
  ExpectOnlyWholeTables(observer_, pair);
}

TEST_P(TableSourceTest, PublishesNoMixtureOfAWriterThatNeverWaits) {
  const TornPair pair;
  const std::string path = directory_ / "t.safetensors";
  fakes::WriteInPlace(path, pair.bytes[0]);
  const auto source = NewSource(store_, &observer_);
  ASSERT_TRUE(source->Start().ok());

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

INSTANTIATE_TEST_SUITE_P(EverySource, TableSourceTest, testing::ValuesIn(ListTableSources()),
                         [](const auto& info) { return info.param; });

TEST(NewTableSource, RefusesAnUnknownKindNamingTheKnown) {
  tables::TableStore store;
  const absl::Status status = NewTableSource("tape", {}, store, SystemClock(), nullptr).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("directory"));
}

}  // namespace
}  // namespace keepset::service
