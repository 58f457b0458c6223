#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/safetensors.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

int CountEntries(const std::string& directory) {
  const std::filesystem::directory_iterator entries(directory);
  return static_cast<int>(std::distance(begin(entries), end(entries)));
}

// Stands for a full disk: writes beyond `bytes` fail until the object goes.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : previous_handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &previous_);
    rlimit limit = previous_;
    limit.rlim_cur = bytes;
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &previous_);
    std::signal(SIGXFSZ, previous_handler_);
  }

 private:
  void (*previous_handler_)(int);
  rlimit previous_;
};

TEST(WriteFileAtomically, WritesAndReplacesWithoutLeavingOthers) {
  TemporaryDirectory directory;
  const std::string path = directory.Path("f");
  ASSERT_TRUE(WriteFileAtomically(path, "one").ok());
  ASSERT_TRUE(WriteFileAtomically(path, "two").ok());
  EXPECT_EQ(ReadText(path), "two");
  EXPECT_EQ(CountEntries(directory.path()), 1);
}

TEST(WriteFileAtomically, AFullDiskIsResourceExhaustedAndKeepsTheOldFile) {
  TemporaryDirectory directory;
  const std::string path = directory.Path("f");
  ASSERT_TRUE(WriteFileAtomically(path, "old").ok());
  absl::Status status;
  {
    const FileSizeLimit limit(1024);
    status = WriteFileAtomically(path, std::string(4096, 'x'));
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_EQ(ReadText(path), "old");
  EXPECT_EQ(CountEntries(directory.path()), 1);
}

TEST(WriteFileAtomically, AMissingDirectoryIsNotFound) {
  TemporaryDirectory directory;
  EXPECT_EQ(WriteFileAtomically(directory.Path("none/f"), "x").code(), absl::StatusCode::kNotFound);
}

TEST(WriteFileAtomically, AForbiddenDirectoryIsPermissionDenied) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write everywhere";
  TemporaryDirectory directory;
  ASSERT_EQ(::chmod(directory.path().c_str(), 0500), 0);
  EXPECT_EQ(WriteFileAtomically(directory.Path("f"), "x").code(),
            absl::StatusCode::kPermissionDenied);
  ::chmod(directory.path().c_str(), 0700);
}

TEST(WriteFileAtomically, RefusesToReplaceWhatIsNoFile) {
  TemporaryDirectory directory;
  ASSERT_EQ(::mkfifo(directory.Path("fifo").c_str(), 0600), 0);
  EXPECT_EQ(WriteFileAtomically(directory.Path("fifo"), "x").code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(WriteFileAtomically(directory.path(), "x").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CountEntries(directory.path()), 1);
}

TEST(WriteFileAtomically, FollowsALink) {
  TemporaryDirectory directory;
  WriteText(directory.Path("target"), "old");
  std::filesystem::create_symlink("target", directory.Path("link"));
  ASSERT_TRUE(WriteFileAtomically(directory.Path("link"), "new").ok());
  EXPECT_EQ(ReadText(directory.Path("target")), "new");
  EXPECT_TRUE(std::filesystem::is_symlink(directory.Path("link")));
}

TEST(WriteFileAtomically, HonoursTheUmask) {
  TemporaryDirectory directory;
  const mode_t previous = ::umask(027);
  const absl::Status status = WriteFileAtomically(directory.Path("f"), "x");
  ::umask(previous);
  ASSERT_TRUE(status.ok());
  struct stat info;
  ASSERT_EQ(::stat(directory.Path("f").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640);
}

}  // namespace
}  // namespace keepset::tables
