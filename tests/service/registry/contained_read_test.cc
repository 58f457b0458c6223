#include "service/registry/contained_read.h"

#include <sys/stat.h>

#include <filesystem>

#include "gtest/gtest.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

class ContainedReadTest : public testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directory(root_);
    fakes::WriteInPlace(root_ + "/inside", "inside");
    fakes::WriteInPlace(scratch_ / "outside", "outside");
    if (absl::IsUnimplemented(ReadContained(root_, "inside", 100).status())) {
      GTEST_SKIP() << "this kernel has no openat2";
    }
  }
  absl::StatusCode CodeOf(const std::string& path) const {
    return ReadContained(root_, path, 100).status().code();
  }

  const fakes::ScratchDirectory scratch_;
  const std::string root_ = scratch_ / "root";
};

TEST_F(ContainedReadTest, ReadsAFileAndALinkThatStayInside) {
  std::filesystem::create_symlink("inside", root_ + "/link");
  EXPECT_EQ(*ReadContained(root_, "inside", 100), "inside");
  EXPECT_EQ(*ReadContained(root_, "link", 100), "inside");
}

TEST_F(ContainedReadTest, RefusesEveryWayOut) {
  std::filesystem::create_symlink("../outside", root_ + "/relative");
  std::filesystem::create_symlink(scratch_ / "outside", root_ + "/absolute");
  std::filesystem::create_directory_symlink("..", root_ + "/up");
  for (const std::string& path :
       {std::string("../outside"), scratch_ / "outside", std::string("relative"),
        std::string("absolute"), std::string("up/outside"), std::string("inside/../../outside"),
        std::string("")}) {
    EXPECT_EQ(CodeOf(path), absl::StatusCode::kInvalidArgument) << path;
  }
}

TEST_F(ContainedReadTest, RefusesWhatIsNoFileWithoutWaiting) {
  ASSERT_EQ(mkfifo((root_ + "/fifo").c_str(), 0600), 0);
  EXPECT_EQ(CodeOf("fifo"), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CodeOf("."), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CodeOf("none"), absl::StatusCode::kNotFound);
}

TEST_F(ContainedReadTest, RefusesALargeFileBeforeItIsRead) {
  EXPECT_EQ(ReadContained(root_, "inside", 5).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace keepset::service
