#include "service/unix_listener.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <filesystem>
#include <string>
#include <vector>

#include "service/memory/memory_transport.h"
#include "tests/integration/server_fixture.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

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

// Both looked at a free path, and the second one took the socket of the first.
TEST(UnixListener, PathOfAServerThatStartsIsInUse) {
  const integration::TempDir root;
  const auto first = UnixListener::Prepare(root.path() + "/k", 0600);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = UnixListener::Prepare(root.path() + "/k", 0600);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(second.status().message(), HasSubstr(root.path() + "/k.lock"));
}

std::vector<std::string> NamesIn(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    names.push_back(entry.path().filename());
  }
  return names;
}

TEST(UnixListener, PublishedSocketLeavesNoPrivateDirectory) {
  const integration::TempDir root;
  auto listener = UnixListener::Prepare(root.path() + "/k", 0600);
  ASSERT_TRUE(listener.ok()) << listener.status();
  const UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  (*listener)->private_path().copy(address.sun_path, sizeof(address.sun_path) - 1);
  ASSERT_EQ(::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  const absl::Status published = (*listener)->Publish();
  ASSERT_TRUE(published.ok()) << published;
  EXPECT_THAT(NamesIn(root.path()), UnorderedElementsAre("k", "k.lock"));
  listener->reset();
  EXPECT_THAT(NamesIn(root.path()), IsEmpty());
}

}  // namespace
}  // namespace keepset::service
