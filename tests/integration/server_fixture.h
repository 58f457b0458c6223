// A whole keepsetd in this process, on a Unix socket in a temporary directory.
#ifndef KEEPSET_TESTS_INTEGRATION_SERVER_FIXTURE_H_
#define KEEPSET_TESTS_INTEGRATION_SERVER_FIXTURE_H_

#include <grpcpp/channel.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <sstream>
#include <streambuf>
#include <string>

#include "absl/synchronization/mutex.h"
#include "base/log.h"
#include "keepset/v1/compression.grpc.pb.h"
#include "keepset/v1/server.grpc.pb.h"
#include "keepset/v1/session.grpc.pb.h"
#include "service/server.h"
#include "tests/fakes/gated_backend.h"
#include "tests/integration/eventually.h"

namespace keepset::integration {

class TempDir {
 public:
  TempDir();
  ~TempDir();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Log lines of a server; thread-safe.
class CapturedLog : private std::streambuf {
 public:
  CapturedLog() : stream_(this), logger_(&stream_, LogFormat::kText, SystemClock()) {}
  Logger& logger() { return logger_; }
  std::string text() const;
  // True when a line holds every one of `parts` before the deadline.
  bool AwaitLine(const std::vector<std::string>& parts) const;
  // Whoever writes a line that holds `text` waits, until Release. Empty: nobody.
  void Hold(const std::string& text);
  void Release() { Hold(""); }

 private:
  int_type overflow(int_type c) override;
  std::streamsize xsputn(const char* data, std::streamsize size) override;

  mutable absl::Mutex mutex_;
  bool MayGoOn() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::string text_ ABSL_GUARDED_BY(mutex_);
  std::string held_ ABSL_GUARDED_BY(mutex_);
  std::ostream stream_;
  Logger logger_;
};

// Status of grpc.health.v1 at `address`: 1 serving, 2 not serving; negative: the gRPC code.
int HealthAt(const std::string& address, const std::string& service);

class TestServer {
 public:
  // `config`: textproto over what the fixture sets (socket, metrics on a free port).
  // `layers_at_once`: how many layers the backend takes together.
  explicit TestServer(const std::string& config = "", int64_t layers_at_once = 1);
  ~TestServer();

  service::Server& server() { return *server_; }
  fakes::Gate& gate() { return gate_; }
  CapturedLog& log() { return log_; }
  // Times the server said that its device failed.
  int device_faults() const { return device_faults_; }
  const std::string& directory() const { return directory_.path(); }
  std::string address() const { return "unix:" + directory_.path() + "/keepset.sock"; }

  // Starts to end the server; the fixture's other members stay.
  void Stop() { server_.reset(); }

  std::shared_ptr<grpc::Channel> NewChannel() const;
  std::unique_ptr<v1::CompressionService::Stub> compression() const;
  std::unique_ptr<v1::SessionService::Stub> sessions() const;
  std::unique_ptr<v1::ServerService::Stub> info() const;
  int Health(const std::string& service) const { return HealthAt(address(), service); }

 private:
  TempDir directory_;
  CapturedLog log_;
  std::atomic<int> device_faults_ = 0;
  fakes::Gate gate_;
  std::unique_ptr<service::Server> server_;
};

// A client context that gives up after TestDeadline().
std::unique_ptr<grpc::ClientContext> NewContext();

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_SERVER_FIXTURE_H_
