#include "service/unix_listener.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/integration/server_fixture.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;

TEST(UnixListener, DirectoryTooDeepForItsPrivateSocketIsNamed) {
  const integration::TempDir root;
  // The path itself would fit a socket address, the private one beside it would not.
  const std::string directory = root.path() + "/" + std::string(104 - root.path().size() - 1, 'd');
  std::filesystem::create_directory(directory);
  const auto listener = UnixListener::Prepare(directory + "/k", 0600);
  EXPECT_EQ(listener.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(listener.status().message(), HasSubstr("path of 104 bytes, want at most 95"));
}

TEST(UnixListener, MissingDirectoryIsNamed) {
  const integration::TempDir root;
  const auto listener = UnixListener::Prepare(root.path() + "/none/k", 0600);
  EXPECT_EQ(listener.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(listener.status().message(),
              HasSubstr("directory " + root.path() + "/none: No such file or directory"));
}

TEST(UnixListener, RelativePathLiesInTheWorkingDirectory) {
  const integration::TempDir root;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(root.path());
  {
    const auto listener = UnixListener::Prepare("relative.sock", 0600);
    EXPECT_TRUE(listener.ok()) << listener.status();
  }
  std::filesystem::current_path(before);
}

}  // namespace
}  // namespace keepset::service
