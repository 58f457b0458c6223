#include "service/server.h"

#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "kernels/backend_registry.h"
#include "service/server_config/server_config.h"
#include "service/server_info.h"
#include "tables/safetensors.h"
#include "tables/table_file.h"
#include "tests/fakes/gated_backend.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::Not;

constexpr int kServing = 1;
constexpr int kNotServing = 2;
constexpr char kCompression[] = "keepset.v1.CompressionService";

absl::Status StartStatus(const std::string& config, CapturedLog& log) {
  absl::StatusOr<v1::ServerConfig> parsed = service::ParseServerConfig(config, "test");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  if (parsed->metrics_listen().empty()) parsed->set_metrics_listen("off");
  EXPECT_TRUE(service::ResolveServerConfig(*parsed).ok());
  return service::Server::Start(
             *parsed,
             {.clock = SystemClock(), .log = log.logger(), .random_seed = 1, .backend = nullptr})
      .status();
}

TEST(Server, TellsWhatItIs) {
  TestServer server;
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(server.info()->GetServerInfo(NewContext().get(), {}, &info).ok());
  EXPECT_THAT(info.policies(), Contains("compilerkv"));
  EXPECT_THAT(info.extensions(),
              IsSupersetOf({"stream", "gather_in_place", "statistics", "memfd"}));
  EXPECT_THAT(info.transports(), Contains("memfd"));
  EXPECT_THAT(info.backend(), HasSubstr("cpu/"));
  EXPECT_THAT(info.device_status(), HasSubstr("no device"));
  EXPECT_EQ(info.limits().max_inline_bytes(), uint64_t{64} << 20);
  EXPECT_FALSE(info.draining());
}

// A backend that says it runs on a device.
class BackendOnADevice : public fakes::GatedBackend {
 public:
  using GatedBackend::GatedBackend;
  kernels::DeviceInfo Device() const override {
    return {.uuid = "GPU-a",
            .name = "first",
            .driver_version = "13.0",
            .compute_capability = "9.0",
            .memory_bytes = 1024,
            .note = ""};
  }
};

std::string CapabilitiesOf(const v1::Device& device) {
  std::string text;
  for (const v1::DeviceCapability& capability : device.capabilities()) {
    absl::StrAppend(&text, capability.name(),
                    capability.available() ? " " : " no: ", capability.reason(), ";");
  }
  return text;
}

TEST(Server, TellsWhatEachDeviceCanDoForIt) {
  fakes::Gate gate;
  const BackendOnADevice backend(*kernels::NewBackend("cpu", {}), gate);
  const v1::GetServerInfoResponse info = service::DescribeServer(
      {}, backend, {},
      {{.kind = "memfd", .devices = {}},
       {.kind = "cuda_ipc", .devices = {{"GPU-a", "first", ""}, {"GPU-b", "second", "too old"}}},
       {.kind = "cuda_vmm", .devices = {{"GPU-a", "first", ""}, {"GPU-b", "second", ""}}}});
  ASSERT_EQ(info.devices_size(), 2);
  EXPECT_EQ(info.devices(0).uuid(), "GPU-a");
  EXPECT_EQ(info.devices(0).compute_capability(), "9.0");
  EXPECT_EQ(info.devices(0).memory_bytes(), 1024u);
  EXPECT_EQ(CapabilitiesOf(info.devices(0)), "compute ;cuda_ipc ;cuda_vmm ;");
  EXPECT_EQ(info.devices(1).name(), "second");
  EXPECT_EQ(CapabilitiesOf(info.devices(1)), "cuda_ipc no: too old;cuda_vmm ;");
}

TEST(Server, LogsOneReadyLineWithItsAddresses) {
  TestServer server;
  EXPECT_TRUE(
      server.log().AwaitLine({"ready", "listen=" + server.address(), "metrics=127.0.0.1:"}));
}

TEST(Server, WarnsAtStartOfTooFewDescriptorsForItsSessions) {
  rlimit limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  rlimit low = limit;
  low.rlim_cur = 256;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
  {
    TestServer few("memory { max_sessions: 8 }");
    TestServer many("memory { max_sessions: 80 }");
    EXPECT_THAT(few.log().text(), Not(HasSubstr("few_descriptors")));
    EXPECT_THAT(many.log().text(), HasSubstr("few_descriptors limit=256"));
  }
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

TEST(Server, HealthListenerSaysWhatTheServerSays) {
  TestServer server("health_listen: \"127.0.0.1:0\"");
  const std::string address = server.server().health_address();
  EXPECT_EQ(HealthAt(address, ""), kServing);
  EXPECT_EQ(HealthAt(address, kCompression), kServing);
  server.server().StartDraining();
  EXPECT_EQ(HealthAt(address, ""), kServing);
  EXPECT_EQ(HealthAt(address, kCompression), kNotServing);
}

TEST(Server, HealthListenerServesNothingElse) {
  TestServer server("health_listen: \"127.0.0.1:0\"");
  const auto stub = v1::ServerService::NewStub(
      grpc::CreateChannel(server.server().health_address(), grpc::InsecureChannelCredentials()));
  v1::GetServerInfoResponse info;
  EXPECT_EQ(stub->GetServerInfo(NewContext().get(), {}, &info).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

TEST(Server, HealthPortInUseNamesTheAddress) {
  TestServer first("health_listen: \"127.0.0.1:0\"");
  TempDir directory;
  CapturedLog log;
  const absl::Status status =
      StartStatus("listen: \"unix:" + directory.path() + "/k\" health_listen: \"" +
                      first.server().health_address() + "\"",
                  log);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  EXPECT_THAT(status.message(), HasSubstr(first.server().health_address()));
}

TEST(Server, SocketHasItsModeFromTheStart) {
  TestServer server("socket_mode: 0660");
  struct stat info;
  ASSERT_EQ(::stat((server.directory() + "/keepset.sock").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0660);
}

TEST(Server, SocketIsGoneAfterTheEnd) {
  TestServer server;
  server.Stop();
  EXPECT_NE(::access((server.directory() + "/keepset.sock").c_str(), F_OK), 0);
}

TEST(Server, SocketOfARunningServerIsNotTaken) {
  TestServer server;
  CapturedLog log;
  const absl::Status status = StartStatus(
      "listen: \"" + server.address() + "\" side_socket: \"" + server.directory() + "/x\"", log);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  EXPECT_THAT(status.message(), HasSubstr(server.address()));
  const fakes::SyntheticPrompt prompt({});
  EXPECT_TRUE(Compress(server, WireRequest(prompt, "tova", 24), nullptr).ok());
}

TEST(Server, StaleSocketIsReplaced) {
  TempDir directory;
  const std::string path = directory.path() + "/keepset.sock";
  {
    const service::UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
    ASSERT_EQ(::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  CapturedLog log;
  EXPECT_TRUE(StartStatus("listen: \"unix:" + path + "\"", log).ok());
}

TEST(Server, FileThatIsNoSocketIsLeftAlone) {
  TempDir directory;
  const std::string path = directory.path() + "/notes.txt";
  std::ofstream(path) << "text";
  CapturedLog log;
  const absl::Status status = StartStatus("listen: \"unix:" + path + "\"", log);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("no socket"));
  EXPECT_EQ(::access(path.c_str(), F_OK), 0);
}

TEST(Server, PortInUseNamesTheAddress) {
  TestServer first("allow_insecure_tcp: true listen: \"127.0.0.1:0\"");
  const std::string taken = first.server().addresses()[0];
  CapturedLog log;
  const absl::Status status =
      StartStatus("allow_insecure_tcp: true listen: \"" + taken + "\"", log);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  EXPECT_THAT(status.message(), HasSubstr(taken));
}

TEST(Server, MetricsPortInUseNamesTheAddress) {
  TestServer first;
  TempDir directory;
  CapturedLog log;
  const absl::Status status =
      StartStatus("listen: \"unix:" + directory.path() + "/s\" metrics_listen: \"" +
                      first.server().metrics_address() + "\"",
                  log);
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  EXPECT_THAT(status.message(), HasSubstr(first.server().metrics_address()));
}

TEST(Server, MissingTablesDirectoryIsNamed) {
  TempDir directory;
  CapturedLog log;
  const std::string tables = directory.path() + "/none";
  const absl::Status status = StartStatus(
      "listen: \"unix:" + directory.path() + "/s\" tables_directory: \"" + tables + "\"", log);
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(status.message(), HasSubstr(tables));
}

TEST(Server, MissingTlsFileIsNamed) {
  CapturedLog log;
  const absl::Status status = StartStatus(
      "listen: \"127.0.0.1:0\" tls { certificate_file: \"/nowhere/cert.pem\" key_file: \"/k\" }",
      log);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("/nowhere/cert.pem"));
}

TEST(Server, ServesATableOfItsDirectory) {
  TempDir directory;
  const fakes::SyntheticPrompt prompt({});
  tables::CompilerKvTableContent content = tables::UniformTable(prompt.model(), 1.0f, 0.9f);
  content.name = "synthetic";
  content.version = "1";
  const absl::StatusOr<std::string> bytes = tables::SerializeTable(content);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  ASSERT_TRUE(
      tables::WriteFileAtomically(directory.path() + "/synthetic.safetensors", *bytes).ok());
  TestServer server("tables_directory: \"" + directory.path() + "\"");
  v1::CompressRequest request = WireRequest(prompt, "compilerkv", 24);
  request.mutable_spec()->set_ppl(8.0);
  v1::OperationResult result;
  const grpc::Status status = Compress(server, request, &result);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(result.table().name(), "synthetic");
  EXPECT_EQ(result.table().source(), "uniform");
  EXPECT_THAT(result.table().digest(), HasSubstr("sha256:"));
  EXPECT_EQ(server.Health(prompt.model().architecture), kServing);

  request.mutable_spec()->mutable_table()->set_version("2");
  EXPECT_EQ(Compress(server, request, nullptr).error_code(), grpc::StatusCode::NOT_FOUND);

  ASSERT_EQ(::unlink((directory.path() + "/synthetic.safetensors").c_str()), 0);
  EXPECT_TRUE(
      Eventually([&] { return server.Health(prompt.model().architecture) == kNotServing; }));
}

TEST(Server, HealthOfAnUnknownNameIsNotFound) {
  TestServer server;
  EXPECT_EQ(server.Health("no.such.model"), -static_cast<int>(grpc::StatusCode::NOT_FOUND));
}

}  // namespace
}  // namespace keepset::integration
