#include "service/registry/file_lease.h"

#include <fcntl.h>
#include <unistd.h>

#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

class FileLeaseTest : public testing::Test {
 protected:
  void SetUp() override {
    fakes::WriteInPlace(path_, "content");
    reader_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    ASSERT_GE(reader_, 0);
    if (FileLease(reader_).state() == FileLease::State::kUnsupported) {
      GTEST_SKIP() << "the filesystem of " << path_ << " grants no leases";
    }
  }
  void TearDown() override { close(reader_); }

  const fakes::ScratchDirectory directory_;
  const std::string path_ = directory_ / "file";
  int reader_ = -1;
};

TEST_F(FileLeaseTest, IsHeldWhileNobodyWrites) {
  EXPECT_EQ(FileLease(reader_).state(), FileLease::State::kHeld);
}

TEST_F(FileLeaseTest, IsRefusedWhileAWriterHasTheFileOpen) {
  const int writer = open(path_.c_str(), O_WRONLY | O_CLOEXEC);
  EXPECT_EQ(FileLease(reader_).state(), FileLease::State::kWriterActive);
  close(writer);
  EXPECT_EQ(FileLease(reader_).state(), FileLease::State::kHeld);
}

TEST_F(FileLeaseTest, HoldsAWriterBackUntilItIsGivenBackAndEndsNoProcess) {
  std::thread writer;
  {
    const FileLease lease(reader_);
    ASSERT_EQ(lease.state(), FileLease::State::kHeld);
    EXPECT_LT(open(path_.c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK), 0);
    writer = std::thread([this] { fakes::WriteInPlace(path_, "changed"); });
    // The writer has asked when the lease is on its way out.
    const absl::Time deadline = absl::Now() + absl::Seconds(20);
    while (fcntl(reader_, F_GETLEASE) != F_UNLCK && absl::Now() < deadline) {
      std::this_thread::yield();
    }
    char buffer[7];
    EXPECT_EQ(pread(reader_, buffer, sizeof(buffer), 0), 7);
    EXPECT_EQ(std::string(buffer, 7), "content");
  }
  writer.join();
  char buffer[7];
  EXPECT_EQ(pread(reader_, buffer, sizeof(buffer), 0), 7);
  EXPECT_EQ(std::string(buffer, 7), "changed");
}

TEST(FileLease, IsUnsupportedOnWhatCannotBeLeased) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  EXPECT_EQ(FileLease(ends[0]).state(), FileLease::State::kUnsupported);
  close(ends[0]);
  close(ends[1]);
}

}  // namespace
}  // namespace keepset::service
