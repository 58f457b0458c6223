#include <fcntl.h>
#include <linux/capability.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/registry/directory_tables.h"
#include "service/registry/file_lease.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"
#include "service/registry/table_source.h"
#include "tests/fakes/await_view.h"
#include "tests/fakes/fake_registry_observer.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class DirectorySourceTest : public testing::Test {
 protected:
  DirectorySourceOptions Options() const {
    DirectorySourceOptions options;
    options.directory = directory_.path();
    options.debounce = absl::Milliseconds(1);
    return options;
  }

  // Watches until the end of the test.
  void Start(const DirectorySourceOptions& options) {
    source_ = NewSource(options);
    const absl::Status status = source_->Start();
    ASSERT_TRUE(status.ok()) << status;
  }

  std::unique_ptr<TableSource> NewSource(const DirectorySourceOptions& options) {
    return NewDirectorySource({.directory = options},
                              {.registry = *registry_, .loader = *loader_, .clock = SystemClock()});
  }

  const fakes::ScratchDirectory directory_;
  tables::TableStore store_;
  fakes::FakeRegistryObserver observer_;
  const std::unique_ptr<TableLoader> loader_ = NewTableLoader();
  const std::unique_ptr<TableRegistry> registry_ =
      *TableRegistry::New({.store = &store_, .clock = &SystemClock(), .observer = &observer_});
  std::unique_ptr<TableSource> source_;
};

TEST(IsTableFileName, TakesTablesAndLeavesWhatWritersPutBeside) {
  EXPECT_TRUE(IsTableFileName("qwen2.5-0.5b.safetensors"));
  for (const char* name :
       {".safetensors", ".a.safetensors", ".a.safetensors.swp", ".#a.safetensors", "a.safetensors~",
        "a.safetensors.swp", "a.safetensors.tmp", "#a.safetensors#", "a.json", "..data", "4913"}) {
    EXPECT_FALSE(IsTableFileName(name)) << name;
  }
}

TEST_F(DirectorySourceTest, DeliversNothingFromAnEmptyDirectory) {
  Start(Options());
  EXPECT_TRUE(store_.Snapshot()->tables.empty());
  ASSERT_EQ(observer_.health().size(), 1);
  EXPECT_EQ(observer_.health()[0].file, "directory");
  EXPECT_TRUE(observer_.health()[0].why.ok());
}

TEST_F(DirectorySourceTest, RefusesToStartWithoutItsDirectory) {
  DirectorySourceOptions options = Options();
  options.directory = directory_ / "none";
  const absl::Status status = NewSource(options)->Start();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr(options.directory));
}

TEST_F(DirectorySourceTest, RefusesToStartOnAFile) {
  DirectorySourceOptions options = Options();
  options.directory = directory_ / "file";
  fakes::WriteInPlace(options.directory, "x");
  EXPECT_EQ(NewSource(options)->Start().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(DirectorySourceTest, RefusesToStartOnAnUnreadableDirectory) {
  if (geteuid() == 0) GTEST_SKIP() << "root reads every directory";
  chmod(directory_.path().c_str(), 0);
  const absl::Status status = NewSource(Options())->Start();
  chmod(directory_.path().c_str(), 0700);
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(status.message()), HasSubstr(directory_.path()));
}

TEST_F(DirectorySourceTest, WithdrawsTheTableOfADeletedFile) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("a", "1"));
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("b", "2"));
  Start(Options());
  fs::remove(directory_ / "a.safetensors");
  EXPECT_TRUE(observer_.WaitForVersions({"2"}));
}

TEST_F(DirectorySourceTest, FollowsTheDataLinkOfAConfigMap) {
  const auto write_release = [this](const std::string& release) {
    fs::create_directory(directory_ / absl::StrCat("..", release));
    for (const char* name : {"a", "b"}) {
      fakes::WriteInPlace(directory_ / absl::StrCat("..", release, "/", name, ".safetensors"),
                          fakes::TableBytes(name, release));
    }
  };
  write_release("r0");
  fs::create_directory_symlink("..r0", directory_ / "..data");
  fs::create_symlink("..data/a.safetensors", directory_ / "a.safetensors");
  fs::create_symlink("..data/b.safetensors", directory_ / "b.safetensors");
  Start(Options());
  ASSERT_TRUE(observer_.WaitForVersions({"r0", "r0"}));
  for (int i = 1; i <= 20; ++i) {
    const std::string release = absl::StrCat("r", i);
    write_release(release);
    fs::create_directory_symlink(absl::StrCat("..", release), directory_ / "..data_tmp");
    fs::rename(directory_ / "..data_tmp", directory_ / "..data");
    fs::remove_all(directory_ / absl::StrCat("..r", i - 1));
    ASSERT_TRUE(observer_.WaitForVersions({release, release}));
  }
  for (const auto& set : observer_.published()) {
    if (set.empty()) continue;  // before the source began
    ASSERT_EQ(set.size(), 2);
    EXPECT_EQ(set[0].version, set[1].version) << "files of two releases in one set";
  }
}

TEST_F(DirectorySourceTest, IgnoresWhatEditorsPutBesideATable) {
  const std::string path = directory_ / "a.safetensors";
  fakes::WriteInPlace(path, fakes::TableBytes("a", "1"));
  Start(Options());
  fakes::WriteInPlace(directory_ / ".a.safetensors.swp", "swap");
  fakes::WriteInPlace(directory_ / "4913", "");
  fs::rename(path, path + "~");
  fakes::WriteInPlace(path, fakes::TableBytes("a", "2"));
  ASSERT_TRUE(observer_.WaitForVersions({"2"}));
  EXPECT_TRUE(observer_.refused().empty());
}

TEST_F(DirectorySourceTest, TurnsARenameStormIntoFewPublishes) {
  const std::string path = directory_ / "a.safetensors";
  fakes::WriteInPlace(path, fakes::TableBytes("a", "0"));
  DirectorySourceOptions options = Options();
  options.debounce = absl::Milliseconds(100);
  Start(options);
  constexpr int kRenames = 200;
  const std::string last = absl::StrCat("v", kRenames);
  for (int i = 1; i <= kRenames; ++i) {
    fakes::WriteAndRename(path, fakes::TableBytes("a", absl::StrCat("v", i)));
  }
  ASSERT_TRUE(observer_.WaitForVersions({last}));
  EXPECT_LT(observer_.published().size(), kRenames / 4);
  EXPECT_TRUE(observer_.refused().empty());
}

TEST_F(DirectorySourceTest, PublishesNothingWhenTheContentStaysTheSame) {
  const std::string a = directory_ / "a.safetensors";
  fakes::WriteInPlace(a, fakes::TableBytes("a", "1"));
  Start(Options());
  fakes::WriteAndRename(a, fakes::TableBytes("a", "1"));
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("b", "1"));
  ASSERT_TRUE(observer_.WaitForVersions({"1", "1"}));
  const size_t with_both = observer_.published().size();
  fakes::WriteAndRename(a, fakes::TableBytes("a", "1"));
  fakes::WriteInPlace(directory_ / "c.safetensors", fakes::TableBytes("c", "1"));
  ASSERT_TRUE(observer_.WaitForVersions({"1", "1", "1"}));
  EXPECT_EQ(observer_.published().size(), with_both + 1);
}

TEST_F(DirectorySourceTest, ReportsADamagedFileOncePerChange) {
  const std::string bad = directory_ / "bad.safetensors";
  fakes::WriteInPlace(bad, "no table");
  Start(Options());
  ASSERT_EQ(observer_.refused().size(), 1);
  for (int i = 1; i <= 10; ++i) {
    const std::string version = absl::StrCat(i);
    fakes::WriteAndRename(directory_ / "a.safetensors", fakes::TableBytes("a", version));
    ASSERT_TRUE(observer_.WaitForVersions({version}));
  }
  EXPECT_EQ(observer_.refused().size(), 1);
  fakes::WriteAndRename(bad, "no table");
  ASSERT_TRUE(observer_.WaitForRefusals(2));
  EXPECT_EQ(observer_.refused()[1].file, "bad.safetensors");
}

TEST_F(DirectorySourceTest, RefusesTheSecondFileOfAVersionNamingBoth) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("same", "1", 1.0f));
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("same", "1", 1.25f));
  Start(Options());
  ASSERT_TRUE(observer_.WaitForVersions({"1"}));
  ASSERT_EQ(observer_.refused().size(), 1);
  EXPECT_EQ(observer_.refused()[0].file, "b.safetensors");
  const std::string message(observer_.refused()[0].why.message());
  EXPECT_THAT(message, HasSubstr("a.safetensors"));
  EXPECT_THAT(message, HasSubstr("b.safetensors"));
  fs::remove(directory_ / "a.safetensors");
  EXPECT_TRUE(
      observer_.WaitForDigest("same", fakes::DigestOf(fakes::TableBytes("same", "1", 1.25f))));
}

TEST_F(DirectorySourceTest, KeepsTheOldTableOfAFileWhoseNewVersionIsTaken) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("a", "1"));
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("b", "1"));
  Start(Options());
  fakes::WriteAndRename(directory_ / "b.safetensors", fakes::TableBytes("a", "1", 1.25f));
  ASSERT_TRUE(observer_.WaitForRefusals(1));
  ASSERT_EQ(store_.Snapshot()->tables.size(), 2);
  EXPECT_EQ(store_.Snapshot()->tables[1]->identity().name, "b");
}

TEST_F(DirectorySourceTest, LoadsEveryVersionAndActivatesTheNewest) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("same", "10"));
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("same", "9"));
  Start(Options());
  ASSERT_TRUE(observer_.WaitForVersions({"10"}));
  EXPECT_EQ(store_.Snapshot()->loaded.size(), 2);
  fakes::WriteInPlace(directory_ / "c.safetensors", fakes::TableBytes("same", "11"));
  ASSERT_TRUE(observer_.WaitForVersions({"11"}));
  fs::remove(directory_ / "c.safetensors");
  ASSERT_TRUE(observer_.WaitForVersions({"10"}));
  EXPECT_TRUE(observer_.refused().empty());
}

TEST_F(DirectorySourceTest, OnlyLoadsANewVersionOnceAnOperatorHasChosen) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("same", "1"));
  Start(Options());
  TableRef first;
  first.name = "same";
  first.version = "1";
  ASSERT_TRUE(registry_->Activate(first, "", {}).ok());
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("same", "2"));
  ASSERT_TRUE(fakes::AwaitView(*registry_, [](const RegistryView& view) {
    return view.lines.at("same")->versions.size() == 2;
  }));
  EXPECT_EQ(store_.Snapshot()->tables.at(0)->identity().version, "1");
}

TEST_F(DirectorySourceTest, KeepsAChosenVersionWhoseFileIsReplaced) {
  const std::string path = directory_ / "a.safetensors";
  fakes::WriteInPlace(path, fakes::TableBytes("same", "1"));
  Start(Options());
  TableRef first;
  first.name = "same";
  first.version = "1";
  ASSERT_TRUE(registry_->Activate(first, "", {}).ok());
  fakes::WriteAndRename(path, fakes::TableBytes("same", "2"));
  ASSERT_TRUE(fakes::AwaitView(*registry_, [](const RegistryView& view) {
    return view.lines.at("same")->versions.size() == 2;
  }));
  EXPECT_EQ(store_.Snapshot()->tables.at(0)->identity().version, "1");
}

TEST_F(DirectorySourceTest, LetsTwoFilesSwapTheirTableNames) {
  fakes::WriteInPlace(directory_ / "a.safetensors", fakes::TableBytes("a", "1"));
  fakes::WriteInPlace(directory_ / "b.safetensors", fakes::TableBytes("b", "2"));
  Start(Options());
  fakes::WriteAndRename(directory_ / "a.safetensors", fakes::TableBytes("b", "3"));
  fakes::WriteAndRename(directory_ / "b.safetensors", fakes::TableBytes("a", "4"));
  EXPECT_TRUE(observer_.WaitForVersions({"4", "3"}));
}

TEST_F(DirectorySourceTest, ReportsALinkThatLeadsNowhereAndReadsItLater) {
  fs::create_symlink("target", directory_ / "a.safetensors");
  Start(Options());
  ASSERT_EQ(observer_.refused().size(), 1);
  fakes::WriteAndRename(directory_ / "target", fakes::TableBytes("a", "1"));
  EXPECT_TRUE(observer_.WaitForVersions({"1"}));
}

TEST_F(DirectorySourceTest, SeesAChangeBehindALinkByScanningAgain) {
  const fakes::ScratchDirectory elsewhere;
  fakes::WriteInPlace(elsewhere / "t", fakes::TableBytes("a", "1"));
  fs::create_symlink(elsewhere / "t", directory_ / "a.safetensors");
  DirectorySourceOptions options = Options();
  options.rescan = absl::Milliseconds(10);
  Start(options);
  ASSERT_TRUE(observer_.WaitForVersions({"1"}));
  fakes::WriteAndRename(elsewhere / "t", fakes::TableBytes("a", "2"));
  EXPECT_TRUE(observer_.WaitForVersions({"2"}));
}

TEST_F(DirectorySourceTest, KeepsServingWhenTheDirectoryGoesAndResumesWhenItReturns) {
  DirectorySourceOptions options = Options();
  options.directory = directory_ / "tables";
  fs::create_directory(options.directory);
  fakes::WriteInPlace(options.directory + "/a.safetensors", fakes::TableBytes("a", "1"));
  Start(options);
  fs::rename(options.directory, directory_ / "gone");
  ASSERT_TRUE(observer_.WaitForHealth("directory", absl::StatusCode::kNotFound));
  EXPECT_EQ(store_.Snapshot()->tables.size(), 1);
  fs::create_directory(directory_ / "next");
  fakes::WriteInPlace(directory_ / "next/a.safetensors", fakes::TableBytes("a", "2"));
  fs::rename(directory_ / "next", options.directory);
  ASSERT_TRUE(observer_.WaitForVersions({"2"}));
  // And it is watched again, not only scanned.
  fakes::WriteAndRename(options.directory + "/a.safetensors", fakes::TableBytes("a", "3"));
  EXPECT_TRUE(observer_.WaitForVersions({"3"}));
  // Well at the start, away once, back again.
  EXPECT_EQ(observer_.health().size(), 3);
  EXPECT_TRUE(observer_.health()[2].why.ok());
}

TEST_F(DirectorySourceTest, ReportsADirectoryWithATableName) {
  fs::create_directory(directory_ / "a.safetensors");
  Start(Options());
  ASSERT_EQ(observer_.refused().size(), 1);
  EXPECT_EQ(observer_.refused()[0].why.code(), absl::StatusCode::kInvalidArgument);
}

// A non-root process and the files of a ConfigMap: no lease is granted, so files settle first.
TEST_F(DirectorySourceTest, PublishesFilesItMayNotLeaseOnceTheyHaveSettled) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to give a file away";
  constexpr uid_t kOtherUser = 65534;
  const std::string path = directory_ / "a.safetensors";
  fakes::WriteInPlace(path, fakes::TableBytes("a", "1"));
  ASSERT_EQ(chown(path.c_str(), kOtherUser, kOtherUser), 0);
  // Capabilities belong to a thread, and the source's thread inherits them from this one.
  std::thread without_capabilities([&] {
    __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct none[2] = {};
    ASSERT_EQ(syscall(SYS_capset, &header, none), 0);
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    EXPECT_EQ(FileLease(fd).state(), FileLease::State::kUnsupported);
    close(fd);
    Start(Options());
    EXPECT_TRUE(observer_.WaitForVersions({"1"}));
  });
  without_capabilities.join();
  EXPECT_TRUE(observer_.refused().empty());
}

TEST_F(DirectorySourceTest, ReadersSeeOneCompleteSetAtAnyTime) {
  const std::string path = directory_ / "a.safetensors";
  fakes::WriteInPlace(path, fakes::TableBytes("a", "0"));
  Start(Options());
  std::atomic<bool> done = false;
  std::thread reader([&] {
    uint64_t last = 0;
    while (!done) {
      const auto snapshot = store_.Snapshot();
      EXPECT_EQ(snapshot->tables.size(), 1);
      EXPECT_GE(snapshot->revision, last);
      last = snapshot->revision;
    }
  });
  for (int i = 1; i <= 50; ++i) {
    const std::string version = absl::StrCat(i);
    fakes::WriteAndRename(path, fakes::TableBytes("a", version));
    EXPECT_TRUE(observer_.WaitForVersions({version}));
  }
  done = true;
  reader.join();
}

}  // namespace
}  // namespace keepset::service
