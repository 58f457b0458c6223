#include "service/tcp_credentials.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

absl::StatusOr<std::string> ReadPem(absl::string_view field, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    const int error = errno;
    return absl::InvalidArgumentError(
        absl::StrCat("tls.", field, "=\"", path, "\": ", std::strerror(error)));
  }
  return text.str();
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> TcpCredentials(
    const v1::ServerConfig::Tls& tls) {
  if (tls.certificate_file().empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions ssl;
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  KEEPSET_ASSIGN_OR_RETURN(pair.cert_chain, ReadPem("certificate_file", tls.certificate_file()));
  KEEPSET_ASSIGN_OR_RETURN(pair.private_key, ReadPem("key_file", tls.key_file()));
  ssl.pem_key_cert_pairs.push_back(std::move(pair));
  if (!tls.client_ca_file().empty()) {
    KEEPSET_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadPem("client_ca_file", tls.client_ca_file()));
    ssl.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  return grpc::SslServerCredentials(ssl);
}

}  // namespace keepset::service
