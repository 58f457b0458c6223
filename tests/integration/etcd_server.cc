#include "tests/integration/etcd_server.h"

#include <arpa/inet.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/integration/eventually.h"

namespace keepset::integration {
namespace {

namespace fs = std::filesystem;

constexpr const char* kEtcd = "/usr/bin/etcd";
// Below the ports the kernel gives to outgoing connections: nobody takes one while etcd restarts.
constexpr int kFirstPort = 20000;
constexpr int kNumPorts = 12000;
constexpr int kStartAttempts = 5;

bool IsFree(int port) {
  const service::UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return ::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
}

int NextFreePort(int& offset) {
  for (int tried = 0; tried < kNumPorts; ++tried) {
    const int port = kFirstPort + offset++ % kNumPorts;
    if (IsFree(port)) return port;
  }
  ADD_FAILURE() << "no free port";
  return 0;
}

// Where a program says that it is ready, as systemd would offer it.
service::UniqueFd NewNotifySocket(const std::string& path) {
  ::unlink(path.c_str());
  service::UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  EXPECT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0) << path;
  return fd;
}

bool AwaitReady(int notify_fd, ChildProcess& process) {
  constexpr int kSliceMs = 50;
  bool is_ready = false;
  Eventually([&] {
    pollfd polled = {notify_fd, POLLIN, 0};
    if (::poll(&polled, 1, kSliceMs) > 0) {
      char text[256] = {};
      const ssize_t size = ::recv(notify_fd, text, sizeof(text) - 1, 0);
      is_ready = size > 0 && std::strstr(text, "READY=1") != nullptr;
    }
    return is_ready || process.HasEnded();
  });
  return is_ready;
}

}  // namespace

EtcdServer::EtcdServer(std::vector<std::string> flags, std::string scheme)
    : flags_(std::move(flags)), scheme_(std::move(scheme)) {
  directory_ = (fs::temp_directory_path() / "keepset_etcd_XXXXXX").string();
  EXPECT_NE(::mkdtemp(directory_.data()), nullptr);
}

EtcdServer::~EtcdServer() {
  Kill();
  std::error_code ignored;
  fs::remove_all(directory_, ignored);
}

bool EtcdServer::Start(Listen listen) {
  if (::access(kEtcd, X_OK) != 0) {
    ADD_FAILURE() << kEtcd << " is missing, want Debian's etcd-server (tools/setup)";
    return false;
  }
  if (port_ != 0) return TryStart(listen);
  int offset = static_cast<int>(std::hash<std::string>()(directory_) % kNumPorts);
  for (int attempt = 0; attempt < kStartAttempts; ++attempt) {
    port_ = NextFreePort(offset);
    admin_port_ = NextFreePort(offset);
    peer_port_ = NextFreePort(offset);
    // Another test may have taken a port in between.
    if (TryStart(listen)) return true;
    EraseData();
  }
  std::ifstream log(directory_ + "/log");
  ADD_FAILURE() << "etcd did not start: " << std::string(std::istreambuf_iterator<char>(log), {});
  return false;
}

bool EtcdServer::TryStart(Listen listen) {
  const std::string notify = directory_ + "/notify";
  const service::UniqueFd notify_fd = NewNotifySocket(notify);
  std::vector<std::string> client_urls = {Url(admin_port_)};
  if (listen == Listen::kEverybody) client_urls.push_back(Url(port_));
  const std::string urls = absl::StrJoin(client_urls, ",");
  const std::string peer = absl::StrCat("http://127.0.0.1:", peer_port_);
  std::vector<std::string> arguments = {
      kEtcd, "--data-dir", directory_ + "/data", "--name", "test", "--listen-client-urls", urls,
      "--advertise-client-urls", urls, "--listen-peer-urls", peer, "--initial-advertise-peer-urls",
      peer, "--initial-cluster", absl::StrCat("test=", peer),
      // One member elects itself: there is nobody to wait for.
      "--heartbeat-interval", "10", "--election-timeout", "100", "--logger", "zap", "--log-outputs",
      directory_ + "/log"};
  arguments.insert(arguments.end(), flags_.begin(), flags_.end());
  process_ = std::make_unique<ChildProcess>(
      arguments, ChildProcess::Output::kStderr,
      std::vector<std::string>{absl::StrCat("NOTIFY_SOCKET=", notify)});
  return AwaitReady(notify_fd.get(), *process_);
}

void EtcdServer::Kill() { process_.reset(); }

void EtcdServer::Freeze() { process_->Freeze(); }

void EtcdServer::Thaw() { process_->Signal(SIGCONT); }

void EtcdServer::EraseData() {
  Kill();
  std::error_code ignored;
  fs::remove_all(directory_ + "/data", ignored);
}

std::string EtcdServer::Url(int port) const { return absl::StrCat(scheme_, "://127.0.0.1:", port); }

std::string EtcdServer::endpoint() const {
  return absl::StrCat(scheme_ == "https" ? "localhost:" : "127.0.0.1:", port_);
}

std::unique_ptr<etcdserverpb::KV::Stub> EtcdServer::Keys() {
  EXPECT_EQ(scheme_, "http") << "the test's own way in speaks no TLS";
  return etcdserverpb::KV::NewStub(grpc::CreateChannel(absl::StrCat("127.0.0.1:", admin_port_),
                                                       grpc::InsecureChannelCredentials()));
}

std::unique_ptr<grpc::ClientContext> EtcdServer::Context() const {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_wait_for_ready(true);
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoSeconds(TestDeadline()));
  if (!token_.empty()) context->AddMetadata("token", token_);
  return context;
}

void EtcdServer::Put(const std::string& key, const std::string& value) { PutAll({{key, value}}); }

int64_t EtcdServer::Commit(const std::vector<std::pair<std::string, std::string>>& pairs,
                           const std::string& deleted) {
  etcdserverpb::TxnRequest request;
  for (const auto& [key, value] : pairs) {
    etcdserverpb::PutRequest* put = request.add_success()->mutable_request_put();
    put->set_key(key);
    put->set_value(value);
  }
  if (!deleted.empty()) request.add_success()->mutable_request_delete_range()->set_key(deleted);
  etcdserverpb::TxnResponse response;
  const grpc::Status status = Keys()->Txn(Context().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.header().revision();
}

void EtcdServer::Delete(const std::string& key) {
  etcdserverpb::DeleteRangeRequest request;
  request.set_key(key);
  etcdserverpb::DeleteRangeResponse response;
  const grpc::Status status = Keys()->DeleteRange(Context().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

std::string EtcdServer::Get(const std::string& key) {
  etcdserverpb::RangeRequest request;
  request.set_key(key);
  etcdserverpb::RangeResponse response;
  const grpc::Status status = Keys()->Range(Context().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.kvs().empty() ? "" : response.kvs(0).value();
}

int64_t EtcdServer::Revision() {
  etcdserverpb::RangeRequest request;
  request.set_key("x");
  request.set_count_only(true);
  etcdserverpb::RangeResponse response;
  const grpc::Status status = Keys()->Range(Context().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.header().revision();
}

void EtcdServer::Compact() {
  etcdserverpb::CompactionRequest request;
  request.set_revision(Revision());
  request.set_physical(true);
  etcdserverpb::CompactionResponse response;
  const grpc::Status status = Keys()->Compact(Context().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

void EtcdServer::RequireLogin(const std::string& password) {
  const auto channel = grpc::CreateChannel(absl::StrCat("127.0.0.1:", admin_port_),
                                           grpc::InsecureChannelCredentials());
  const auto users = etcdserverpb::Auth::NewStub(channel);
  etcdserverpb::AuthUserAddRequest user;
  user.set_name("root");
  user.set_password(password);
  etcdserverpb::AuthUserAddResponse user_added;
  EXPECT_TRUE(users->UserAdd(Context().get(), user, &user_added).ok());
  etcdserverpb::AuthRoleAddRequest role;
  role.set_name("root");
  etcdserverpb::AuthRoleAddResponse role_added;
  EXPECT_TRUE(users->RoleAdd(Context().get(), role, &role_added).ok());
  etcdserverpb::AuthUserGrantRoleRequest grant;
  grant.set_user("root");
  grant.set_role("root");
  etcdserverpb::AuthUserGrantRoleResponse granted;
  EXPECT_TRUE(users->UserGrantRole(Context().get(), grant, &granted).ok());
  etcdserverpb::AuthEnableResponse enabled;
  EXPECT_TRUE(users->AuthEnable(Context().get(), {}, &enabled).ok());
  etcdserverpb::AuthenticateRequest login;
  login.set_name("root");
  login.set_password(password);
  etcdserverpb::AuthenticateResponse logged_in;
  EXPECT_TRUE(users->Authenticate(Context().get(), login, &logged_in).ok());
  token_ = logged_in.token();
}

}  // namespace keepset::integration
