#include "tests/service/memory/memory_test_support.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "base/check.h"

namespace keepset::service::testing {

uint64_t PageBytes() { return static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)); }

UniqueFd NewMemfd(absl::string_view name, uint64_t bytes, Seal seal) {
  UniqueFd fd(::memfd_create(std::string(name).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  KEEPSET_CHECK(fd.valid());
  std::string content(bytes, '\0');
  for (uint64_t i = 0; i < bytes; ++i) content[i] = static_cast<char>(i % 251);
  KEEPSET_CHECK(::write(fd.get(), content.data(), bytes) == static_cast<ssize_t>(bytes));
  int seals = 0;
  if (seal != Seal::kNone) seals |= F_SEAL_SHRINK;
  if (seal == Seal::kShrinkAndWrite) seals |= F_SEAL_WRITE;
  KEEPSET_CHECK(seals == 0 || ::fcntl(fd.get(), F_ADD_SEALS, seals) == 0);
  return fd;
}

RegionDescriptor Whole(absl::string_view kind, uint64_t bytes) {
  RegionDescriptor descriptor;
  descriptor.kind = std::string(kind);
  descriptor.allocation_bytes = bytes;
  descriptor.length = bytes;
  return descriptor;
}

TemporaryDirectory::TemporaryDirectory() {
  std::string pattern = std::filesystem::temp_directory_path().string() + "/keepset-XXXXXX";
  KEEPSET_CHECK(::mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TemporaryDirectory::File(absl::string_view name) const {
  return path_ + "/" + std::string(name);
}

RawSideSocketClient::RawSideSocketClient(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  KEEPSET_CHECK(path.size() < sizeof(address.sun_path));
  std::memcpy(address.sun_path, path.data(), path.size());
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    fd_ = std::move(fd);
  }
}

bool RawSideSocketClient::Send(const void* bytes, size_t size, std::initializer_list<int> fds) {
  iovec data = {const_cast<void*>(bytes), size};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 64)] = {};
  if (fds.size() > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(header), fds.begin(), sizeof(int) * fds.size());
  }
  return ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(size);
}

bool RawSideSocketClient::SendHello(const SideSocketToken& token, std::initializer_list<int> fds) {
  wire::SideSocketRequest request;
  request.type = wire::SideSocketFrameType::kHello;
  std::memcpy(request.token, token.data(), token.size());
  return Send(&request, sizeof(request), fds);
}

bool RawSideSocketClient::SendFds(std::initializer_list<int> fds) {
  wire::SideSocketRequest request;
  request.type = wire::SideSocketFrameType::kPassFd;
  return Send(&request, sizeof(request), fds);
}

bool RawSideSocketClient::SendFetch(uint64_t fd_token) {
  wire::SideSocketRequest request;
  request.type = wire::SideSocketFrameType::kFetchFd;
  request.fd_token = fd_token;
  return Send(&request, sizeof(request));
}

std::optional<wire::SideSocketReply> RawSideSocketClient::Receive(UniqueFd* fd) {
  wire::SideSocketReply reply;
  iovec io = {&reply, sizeof(reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr message = {};
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t received = ::recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC);
  UniqueFd passed;
  if (const cmsghdr* const header = received < 0 ? nullptr : CMSG_FIRSTHDR(&message);
      header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    int number = -1;
    std::memcpy(&number, CMSG_DATA(header), sizeof(number));
    passed.Reset(number);
  }
  if (fd != nullptr) *fd = std::move(passed);
  if (received != static_cast<ssize_t>(sizeof(reply))) return std::nullopt;
  return reply;
}

int64_t CountOpenFds() {
  int64_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

bool IsMapped(absl::string_view text) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find(std::string(text)) != std::string::npos) return true;
  }
  return false;
}

void RecordingObserver::OnSessionEnded(absl::string_view session_id, SessionEnd why,
                                       int64_t /*regions*/) {
  absl::MutexLock lock(&mutex_);
  ended_.push_back({std::string(session_id), why});
}

void RecordingObserver::OnRegionRefused(absl::string_view kind, const absl::Status& /*why*/) {
  absl::MutexLock lock(&mutex_);
  refused_kinds_.emplace_back(kind);
}

std::optional<SessionEnd> RecordingObserver::AwaitEnd(absl::string_view session_id) {
  std::optional<SessionEnd> why;
  const auto has_ended = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    for (const Ended& ended : ended_) {
      if (ended.session_id == session_id) why = ended.why;
    }
    return why.has_value();
  };
  absl::MutexLock lock(&mutex_);
  mutex_.AwaitWithTimeout(absl::Condition(&has_ended), absl::Seconds(10));
  return why;
}

std::vector<std::string> RecordingObserver::refused_kinds() {
  absl::MutexLock lock(&mutex_);
  return refused_kinds_;
}

OpenSessionArgs ArgsOf(char fill) {
  OpenSessionArgs args;
  args.client_uuid = std::string(16, fill);
  args.engine = "test";
  return args;
}

}  // namespace keepset::service::testing
