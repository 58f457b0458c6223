// A scripted server for tests of the client: real sockets, no engine. It keeps the first
// `budget.tokens` positions of every layer and fills gathered rows with a marker byte.
#ifndef KEEPSET_TESTS_CLIENTS_FAKE_KEEPSETD_H_
#define KEEPSET_TESTS_CLIENTS_FAKE_KEEPSETD_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace keepset::client {

// Policies with a meaning: any other name is an ordinary operation.
inline constexpr char kRefusedPolicy[] = "refused";  // InvalidArgument
inline constexpr char kSilentPolicy[] = "silent";    // no answer until the call ends
inline constexpr char kDeafPolicy[] = "deaf";        // nothing of the stream is read after it
inline constexpr char kLyingPolicy[] = "lying";      // keep sets that are not ascending
inline constexpr std::byte kGatheredByte{0x5a};

struct FakeOptions {
  bool offers_memfd = true;
  bool has_side_socket = true;
  uint64_t max_inline_bytes = 0;  // 0: no limit
  uint32_t stream_credits = 2;
  uint32_t heartbeat_seconds = 1;
  int64_t retires_in_use = 0;  // RetireRegion calls that are answered DEADLINE_EXCEEDED
};

// What the server saw, so far.
struct FakeObservations {
  std::vector<std::string> client_uuids;  // one per OpenSession
  std::vector<std::string> region_names;  // one per RegisterRegion that succeeded
  std::vector<std::string> retired;
  int64_t beats = 0;
  int64_t hang_ups = 0;
  int64_t closed_sessions = 0;
  int64_t max_layers_in_flight = 0;  // layer inputs that came before their credit was renewed
  int64_t ended_operations = 0;      // End was received
  int64_t cancelled_operations = 0;
};

// Thread-safe.
class FakeKeepsetd {
 public:
  // Listens on `directory`/keepset.sock; the same directory again stands for a restart.
  static std::unique_ptr<FakeKeepsetd> Start(const std::string& directory,
                                             const FakeOptions& options);
  virtual ~FakeKeepsetd() = default;

  virtual std::string address() const = 0;
  virtual FakeObservations Observed() = 0;
  // Waits until `condition` of the observations holds; false after `timeout`.
  virtual bool Await(bool (*condition)(const FakeObservations&), absl::Duration timeout) = 0;
};

}  // namespace keepset::client

#endif  // KEEPSET_TESTS_CLIENTS_FAKE_KEEPSETD_H_
