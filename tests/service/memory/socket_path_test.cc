#include "service/memory/socket_path.h"

#include <gmock/gmock.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;
using testing::TemporaryDirectory;

constexpr absl::string_view kLabel = "test socket";

UniqueFd BindAt(const SocketPath& path, int type) {
  UniqueFd socket(::socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&path.address()),
                   sizeof(path.address())),
            0);
  return socket;
}

bool Exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

TEST(SocketPath, IsOfOneAtATime) {
  const TemporaryDirectory directory;
  const std::string path = directory.File("s");
  {
    const auto first = SocketPath::Claim(path, kLabel);
    ASSERT_TRUE(first.ok()) << first.status();
    const auto second = SocketPath::Claim(path, kLabel);
    EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
    EXPECT_THAT(second.status().message(), HasSubstr("test socket: in use by a running server"));
  }
  EXPECT_TRUE(SocketPath::Claim(path, kLabel).ok());
}

TEST(SocketPath, RemovesItsSocketAndItsLockFile) {
  const TemporaryDirectory directory;
  const std::string path = directory.File("s");
  {
    auto claimed = SocketPath::Claim(path, kLabel);
    ASSERT_TRUE(claimed.ok()) << claimed.status();
    const UniqueFd socket = BindAt(*claimed, SOCK_STREAM);
    ASSERT_TRUE(claimed->NoteSocket().ok());
    EXPECT_TRUE(Exists(path + ".lock"));
  }
  EXPECT_FALSE(Exists(path));
  EXPECT_FALSE(Exists(path + ".lock"));
}

TEST(SocketPath, LeavesWhatAnotherPutThere) {
  const TemporaryDirectory directory;
  const std::string path = directory.File("s");
  {
    auto claimed = SocketPath::Claim(path, kLabel);
    ASSERT_TRUE(claimed.ok()) << claimed.status();
    const UniqueFd socket = BindAt(*claimed, SOCK_STREAM);
    ASSERT_TRUE(claimed->NoteSocket().ok());
    const std::string other = directory.File("other");
    std::ofstream(other) << "1";
    ASSERT_EQ(::rename(other.c_str(), path.c_str()), 0);
  }
  EXPECT_TRUE(Exists(path));
}

TEST(SocketPath, LockFileThatIsLeftOverSaysNothing) {
  const TemporaryDirectory directory;
  std::ofstream(directory.File("s.lock")) << "";
  EXPECT_TRUE(SocketPath::Claim(directory.File("s"), kLabel).ok());
}

TEST(SocketPath, StaleSocketOfEitherTypeIsRemoved) {
  for (const int type : {SOCK_STREAM, SOCK_SEQPACKET}) {
    const TemporaryDirectory directory;
    const std::string path = directory.File("s");
    BindAt(*SocketPath::Claim(path, kLabel), type);
    ASSERT_TRUE(Exists(path));
    const auto claimed = SocketPath::Claim(path, kLabel);
    EXPECT_TRUE(claimed.ok()) << claimed.status();
    EXPECT_FALSE(Exists(path));
  }
}

TEST(SocketPath, LiveSocketOfEitherTypeIsInUse) {
  for (const int type : {SOCK_STREAM, SOCK_SEQPACKET}) {
    const TemporaryDirectory directory;
    const std::string path = directory.File("s");
    const UniqueFd live = BindAt(*SocketPath::Claim(path, kLabel), type);
    ASSERT_EQ(::listen(live.get(), 1), 0);
    EXPECT_EQ(SocketPath::Claim(path, kLabel).status().code(), absl::StatusCode::kAlreadyExists);
    EXPECT_TRUE(Exists(path));
  }
}

TEST(SocketPath, PathWithANulIsInvalid) {
  EXPECT_EQ(SocketPath::Claim(std::string("/tmp/a\0b", 8), kLabel).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(SocketPath, LockFileThatCannotBeOpenedIsNamed) {
  const TemporaryDirectory directory;
  ASSERT_EQ(::symlink("elsewhere", directory.File("s.lock").c_str()), 0);
  const auto claimed = SocketPath::Claim(directory.File("s"), kLabel);
  EXPECT_EQ(claimed.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(claimed.status().message(), HasSubstr(directory.File("s.lock")));
}

// Each removes the lock file that the other may have opened.
TEST(SocketPath, IsOfOneAtATimeHoweverOftenItIsGivenBack) {
  constexpr int kClaims = 500;
  const TemporaryDirectory directory;
  const std::string path = directory.File("s");
  std::atomic<int> holders = 0;
  std::atomic<int> most = 0;
  const auto claim_and_give_back = [&] {
    for (int i = 0; i < kClaims; ++i) {
      const auto claimed = SocketPath::Claim(path, kLabel);
      if (!claimed.ok()) continue;
      if (++holders > 1) most = 2;
      std::this_thread::yield();
      --holders;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(claim_and_give_back);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(most, 0);
}

}  // namespace
}  // namespace keepset::service
