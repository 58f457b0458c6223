// Memory objects, a raw side-socket client and views of this process, for the tests of the room.
#ifndef KEEPSET_TESTS_SERVICE_MEMORY_MEMORY_TEST_SUPPORT_H_
#define KEEPSET_TESTS_SERVICE_MEMORY_MEMORY_TEST_SUPPORT_H_

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "proto/side_socket_wire.h"
#include "service/memory/memory_transport.h"
#include "service/memory/session_manager.h"

namespace keepset::service::testing {

uint64_t PageBytes();

enum class Seal { kNone, kShrink, kShrinkAndWrite };

// A memfd of `bytes` bytes, byte i holding i % 251.
UniqueFd NewMemfd(absl::string_view name, uint64_t bytes, Seal seal = Seal::kShrink);

// A region over all of `bytes` bytes.
RegionDescriptor Whole(absl::string_view kind, uint64_t bytes);

// A directory that is removed with everything in it.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory();
  std::string File(absl::string_view name) const;

 private:
  std::string path_;
};

// The client's end of a side socket. Blocking; sends whatever it is told to.
class RawSideSocketClient {
 public:
  explicit RawSideSocketClient(const std::string& path);

  bool connected() const { return fd_.valid(); }
  int fd() const { return fd_.get(); }
  void HangUp() { fd_.Reset(); }

  // False when the server closed the connection.
  bool Send(const void* bytes, size_t size, std::initializer_list<int> fds = {});
  bool SendHello(const SideSocketToken& token, std::initializer_list<int> fds = {});
  bool SendFds(std::initializer_list<int> fds);
  bool SendFetch(uint64_t fd_token);
  // Waits for a reply; empty when the server closed the connection instead. A descriptor that came
  // with it is `fd`, else closed.
  std::optional<wire::SideSocketReply> Receive(UniqueFd* fd = nullptr);

 private:
  UniqueFd fd_;
};

// Entries of /proc/self/fd.
int64_t CountOpenFds();
// Whether a line of /proc/self/maps contains `text`.
bool IsMapped(absl::string_view text);

// Remembers how sessions ended.
class RecordingObserver : public SessionObserver {
 public:
  void OnSessionEnded(absl::string_view session_id, SessionEnd why, int64_t regions) override;
  void OnRegionRefused(absl::string_view kind, const absl::Status& why) override;

  // Waits for the end of a session; empty after ten seconds without one.
  std::optional<SessionEnd> AwaitEnd(absl::string_view session_id);
  std::vector<std::string> refused_kinds();

 private:
  struct Ended {
    std::string session_id;
    SessionEnd why;
  };
  absl::Mutex mutex_;
  std::vector<Ended> ended_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> refused_kinds_ ABSL_GUARDED_BY(mutex_);
};

// Sixteen bytes, all `fill`.
OpenSessionArgs ArgsOf(char fill);

}  // namespace keepset::service::testing

#endif  // KEEPSET_TESTS_SERVICE_MEMORY_MEMORY_TEST_SUPPORT_H_
