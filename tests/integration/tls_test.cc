// The TCP edge with certificates: who gets in, who does not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "clients/cpp/client.h"
#include "clients/cpp/table_client.h"
#include "tests/fakes/certificates.h"
#include "tests/integration/server_fixture.h"

namespace keepset::integration {
namespace {

using ::testing::HasSubstr;

class TlsTest : public ::testing::Test {
 protected:
  TlsTest() : authority_(directory_.path()) {
    authority_.Issue("server.test");
    authority_.Issue("worker.test");
  }

  std::string ServerConfig(const std::string& client_ca_file = "") const {
    return absl::StrCat("listen: \"127.0.0.1:0\" tls { certificate_file: \"",
                        authority_.Path("server.test.pem"), "\" key_file: \"",
                        authority_.Path("server.test.key"), "\" client_ca_file: \"", client_ca_file,
                        "\" }");
  }

  client::ClientOptions Options(TestServer& server) const {
    client::ClientOptions options;
    options.address = server.server().addresses()[0];
    // Only the refused wait so long.
    options.connect_timeout = absl::Seconds(2);
    options.tls = {.ca_file = authority_.Path("ca.pem"),
                   .certificate_file = "",
                   .key_file = "",
                   .server_name = "server.test"};
    return options;
  }

  TempDir directory_;
  fakes::CertificateAuthority authority_;
};

TEST_F(TlsTest, ClientThatTrustsTheAuthorityIsServed) {
  TestServer server(ServerConfig());
  const auto client = client::Client::Connect(Options(server));
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_TRUE((*client)->GetServerInfo().ok());
  EXPECT_EQ((*client)->transport(), client::Transport::kInline);
}

TEST_F(TlsTest, AnotherAuthorityIsRefused) {
  const TempDir elsewhere;
  const fakes::CertificateAuthority other(elsewhere.path());
  TestServer server(ServerConfig());
  client::ClientOptions options = Options(server);
  options.tls->ca_file = other.Path("ca.pem");
  EXPECT_EQ(client::Client::Connect(options).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(TlsTest, AnotherServerNameIsRefused) {
  TestServer server(ServerConfig());
  client::ClientOptions options = Options(server);
  options.tls->server_name = "elsewhere.test";
  EXPECT_EQ(client::Client::Connect(options).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(TlsTest, PlainTextIsRefused) {
  TestServer server(ServerConfig());
  client::ClientOptions options = Options(server);
  options.tls.reset();
  EXPECT_EQ(client::Client::Connect(options).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(TlsTest, ClientWithoutACertificateIsRefusedWhereOneIsAsked) {
  TestServer server(ServerConfig(authority_.Path("ca.pem")));
  EXPECT_EQ(client::Client::Connect(Options(server)).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(TlsTest, ClientCertificateIsAccepted) {
  TestServer server(ServerConfig(authority_.Path("ca.pem")));
  client::ClientOptions options = Options(server);
  options.tls->certificate_file = authority_.Path("worker.test.pem");
  options.tls->key_file = authority_.Path("worker.test.key");
  const auto client = client::Client::Connect(options);
  EXPECT_TRUE(client.ok()) << client.status();
}

TEST_F(TlsTest, AuditLineNamesTheCertificateAndThePeer) {
  TestServer server(absl::StrCat(ServerConfig(authority_.Path("ca.pem")), " table_writes: true"));
  client::ClientOptions options = Options(server);
  options.tls->certificate_file = authority_.Path("worker.test.pem");
  options.tls->key_file = authority_.Path("worker.test.key");
  const auto tables = client::TableClient::New(options);
  ASSERT_TRUE(tables.ok()) << tables.status();
  // Whoever the client says it is, the certificate is beside it.
  EXPECT_FALSE((*tables)->Rollback("nothing", {.actor = "somebody"}).ok());
  EXPECT_TRUE(server.log().AwaitLine({"table_write", "method=Rollback",
                                      "peer=ipv4:127.0.0.1:", "tls_subject=worker.test",
                                      "actor=somebody", "result=NOT_FOUND"}));
}

TEST_F(TlsTest, OnlyTheNamedCertificatesMayWriteTables) {
  authority_.Issue("admin.test");
  TestServer server(absl::StrCat(ServerConfig(authority_.Path("ca.pem")),
                                 " table_writes: true table_writers: \"admin.test\""));
  const auto code_of = [&](const client::ClientOptions& options) {
    const auto tables = client::TableClient::New(options);
    EXPECT_TRUE(tables.ok()) << tables.status();
    return (*tables)->Rollback("nothing", {.actor = "admin.test"}).status().code();
  };
  const auto with_certificate = [&](const std::string& name) {
    client::ClientOptions options = Options(server);
    options.tls->certificate_file = authority_.Path(name + ".pem");
    options.tls->key_file = authority_.Path(name + ".key");
    return options;
  };
  EXPECT_EQ(code_of(with_certificate("admin.test")), absl::StatusCode::kNotFound);
  EXPECT_EQ(code_of(with_certificate("worker.test")), absl::StatusCode::kPermissionDenied);
  client::ClientOptions over_socket;
  over_socket.address = server.address();
  EXPECT_EQ(code_of(over_socket), absl::StatusCode::kPermissionDenied);
  EXPECT_TRUE(server.log().AwaitLine(
      {"table_write", "tls_subject=worker.test", "result=PERMISSION_DENIED"}));
  const auto list = (*client::TableClient::New(with_certificate("worker.test")))->List("", "");
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_FALSE(list->writable);
}

TEST_F(TlsTest, CertificateWithoutItsKeyIsAnError) {
  TestServer server(ServerConfig());
  client::ClientOptions options = Options(server);
  options.tls->certificate_file = authority_.Path("worker.test.pem");
  const absl::Status status = client::Client::Connect(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("needs both"));
}

TEST_F(TlsTest, MissingAuthorityFileIsNamed) {
  TestServer server(ServerConfig());
  client::ClientOptions options = Options(server);
  options.tls->ca_file = authority_.Path("absent.pem");
  const absl::Status status = client::Client::Connect(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("absent.pem"));
}

TEST_F(TlsTest, TlsOverAUnixSocketIsAnError) {
  TestServer server;
  client::ClientOptions options = Options(server);
  options.address = server.address();
  const absl::Status status = client::Client::Connect(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("file mode"));
}

}  // namespace
}  // namespace keepset::integration
