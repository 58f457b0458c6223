#include "tests/integration/server_fixture.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/notification.h"
#include "kernels/backend_registry.h"
#include "service/server_config/server_config.h"

namespace keepset::integration {

TempDir::TempDir() {
  path_ = (std::filesystem::temp_directory_path() / "keepset_XXXXXX").string();
  EXPECT_NE(::mkdtemp(path_.data()), nullptr);
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

CapturedLog::int_type CapturedLog::overflow(int_type c) {
  if (c == traits_type::eof()) return 0;
  absl::MutexLock lock(&mutex_);
  text_ += static_cast<char>(c);
  return c;
}

std::streamsize CapturedLog::xsputn(const char* data, std::streamsize size) {
  absl::MutexLock lock(&mutex_);
  text_.append(data, size);
  mutex_.Await(absl::Condition(this, &CapturedLog::MayGoOn));
  return size;
}

// Looks at the last line alone.
bool CapturedLog::MayGoOn() const {
  return held_.empty() || text_.find(held_, text_.rfind('\n', text_.size() - 2) + 1) == text_.npos;
}

void CapturedLog::Hold(const std::string& text) {
  absl::MutexLock lock(&mutex_);
  held_ = text;
}

std::string CapturedLog::text() const {
  absl::MutexLock lock(&mutex_);
  return text_;
}

bool CapturedLog::AwaitLine(const std::vector<std::string>& parts) const {
  return Eventually([&] {
    for (const absl::string_view line : absl::StrSplit(text(), '\n')) {
      bool all = true;
      for (const std::string& part : parts) {
        all = all && line.find(part) != absl::string_view::npos;
      }
      if (all) return true;
    }
    return false;
  });
}

TestServer::TestServer(const std::string& config, int64_t layers_at_once) {
  absl::StatusOr<v1::ServerConfig> parsed = service::ParseServerConfig(config, "test");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  parsed->add_listen(address());
  if (parsed->metrics_listen().empty()) parsed->set_metrics_listen("127.0.0.1:0");
  EXPECT_TRUE(service::ResolveServerConfig(*parsed).ok());
  absl::StatusOr<std::unique_ptr<kernels::ComputeBackend>> backend =
      kernels::NewBackend("cpu", {.num_threads = 1});
  EXPECT_TRUE(backend.ok()) << backend.status();
  absl::StatusOr<std::unique_ptr<service::Server>> server = service::Server::Start(
      *parsed,
      {.clock = SystemClock(),
       .log = log_.logger(),
       .random_seed = 1,
       .backend = std::make_unique<fakes::GatedBackend>(*std::move(backend), gate_, layers_at_once),
       .on_device_fault = [this] { ++device_faults_; }});
  EXPECT_TRUE(server.ok()) << server.status();
  if (server.ok()) server_ = *std::move(server);
}

TestServer::~TestServer() {
  gate_.Open();
  server_.reset();
}

std::shared_ptr<grpc::Channel> TestServer::NewChannel() const {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  // Without this, channels to one address share a connection.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments);
}

std::unique_ptr<v1::CompressionService::Stub> TestServer::compression() const {
  return v1::CompressionService::NewStub(NewChannel());
}

std::unique_ptr<v1::SessionService::Stub> TestServer::sessions() const {
  return v1::SessionService::NewStub(NewChannel());
}

std::unique_ptr<v1::ServerService::Stub> TestServer::info() const {
  return v1::ServerService::NewStub(NewChannel());
}

int HealthAt(const std::string& address, const std::string& service) {
  // HealthCheckRequest {string service = 1}; HealthCheckResponse {ServingStatus status = 1}.
  const std::string bytes =
      service.empty() ? "" : absl::StrCat("\x0a", std::string(1, char(service.size())), service);
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  const auto context = NewContext();
  absl::Notification done;
  grpc::Status status;
  stub.UnaryCall(context.get(), "/grpc.health.v1.Health/Check", grpc::StubOptions(), &request,
                 &response, [&](grpc::Status s) {
                   status = std::move(s);
                   done.Notify();
                 });
  done.WaitForNotification();
  if (!status.ok()) return -static_cast<int>(status.error_code());
  grpc::Slice out;
  if (!response.DumpToSingleSlice(&out).ok() || out.size() < 2) return 0;
  return out.begin()[1];
}

std::unique_ptr<grpc::ClientContext> NewContext() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoSeconds(TestDeadline()));
  return context;
}

}  // namespace keepset::integration
