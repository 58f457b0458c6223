#include "service/registry/stable_read.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "gtest/gtest.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

class StableReadTest : public testing::Test {
 protected:
  void SetUp() override { fakes::WriteInPlace(path_, "content"); }

  FileIdentity Identity() const {
    const absl::StatusOr<FileIdentity> identity = IdentityOf(path_);
    EXPECT_TRUE(identity.ok()) << identity.status();
    return identity.ok() ? *identity : FileIdentity();
  }

  const fakes::ScratchDirectory directory_;
  const std::string path_ = directory_ / "file";
};

TEST_F(StableReadTest, ReadsAFileAtRest) {
  const auto bytes = ReadStable(path_, Identity(), kSettleTime, LeaseUse::kWhereGranted);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(*bytes, "content");
}

TEST_F(StableReadTest, WaitsForAWriterWithAnOpenDescriptor) {
  const int writer = open(path_.c_str(), O_WRONLY | O_CLOEXEC);
  EXPECT_EQ(
      ReadStable(path_, Identity(), absl::ZeroDuration(), LeaseUse::kWhereGranted).status().code(),
      absl::StatusCode::kUnavailable);
  close(writer);
}

TEST_F(StableReadTest, WaitsForAWriterWithAMapping) {
  const int writer = open(path_.c_str(), O_RDWR | O_CLOEXEC);
  void* mapping = mmap(nullptr, 7, PROT_READ | PROT_WRITE, MAP_SHARED, writer, 0);
  close(writer);
  ASSERT_NE(mapping, MAP_FAILED);
  EXPECT_EQ(
      ReadStable(path_, Identity(), absl::ZeroDuration(), LeaseUse::kWhereGranted).status().code(),
      absl::StatusCode::kUnavailable);
  munmap(mapping, 7);
}

TEST_F(StableReadTest, WithoutLeasesWaitsUntilTheFileHasSettled) {
  const FileIdentity identity = Identity();
  EXPECT_EQ(ReadStable(path_, identity, kSettleTime / 2, LeaseUse::kNever).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_TRUE(ReadStable(path_, identity, kSettleTime, LeaseUse::kNever).ok());
}

TEST_F(StableReadTest, RefusesAnotherStateThanTheExpectedOne) {
  const FileIdentity before = Identity();
  fakes::WriteAndRename(path_, "another");
  for (LeaseUse use : {LeaseUse::kWhereGranted, LeaseUse::kNever}) {
    EXPECT_EQ(ReadStable(path_, before, kSettleTime, use).status().code(),
              absl::StatusCode::kUnavailable);
  }
}

TEST_F(StableReadTest, TellsAMissingFile) {
  EXPECT_EQ(IdentityOf(directory_ / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadStable(directory_ / "none", {}, kSettleTime, LeaseUse::kNever).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(StableReadTest, RefusesWhatIsNoRegularFileWithoutWaiting) {
  ASSERT_EQ(mkfifo((directory_ / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(IdentityOf(directory_ / "fifo").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(IdentityOf(directory_.path()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      ReadStable(directory_ / "fifo", Identity(), kSettleTime, LeaseUse::kNever).status().code(),
      absl::StatusCode::kInvalidArgument);
}

TEST_F(StableReadTest, FollowsLinksToTheTarget) {
  std::filesystem::create_symlink(path_, directory_ / "link");
  const absl::StatusOr<FileIdentity> through_link = IdentityOf(directory_ / "link");
  ASSERT_TRUE(through_link.ok()) << through_link.status();
  EXPECT_EQ(*through_link, Identity());
}

}  // namespace
}  // namespace keepset::service
