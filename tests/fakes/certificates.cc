#include "tests/fakes/certificates.h"

#include <gtest/gtest.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <cstdio>
#include <memory>

namespace keepset::fakes {
namespace {

constexpr long kSecondsPerHour = 3600;

void AddExtension(X509* certificate, X509* issuer, int nid, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
  ASSERT_NE(extension, nullptr) << value;
  X509_add_ext(certificate, extension, -1);
  X509_EXTENSION_free(extension);
}

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

File Create(const std::string& path) { return {std::fopen(path.c_str(), "wb"), &std::fclose}; }

}  // namespace

struct CertificateAuthority::Identity {
  explicit Identity(const std::string& name) {
    X509_set_version(certificate, 2);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -kSecondsPerHour);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 24 * kSecondsPerHour);
    X509_set_pubkey(certificate, key);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  }
  ~Identity() {
    X509_free(certificate);
    EVP_PKEY_free(key);
  }
  void Sign(const Identity& issuer, long serial) const {
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), serial);
    X509_set_issuer_name(certificate, X509_get_subject_name(issuer.certificate));
    ASSERT_GT(X509_sign(certificate, issuer.key, EVP_sha256()), 0);
  }

  EVP_PKEY* const key = EVP_EC_gen("P-256");
  X509* const certificate = X509_new();
};

CertificateAuthority::CertificateAuthority(const std::string& directory)
    : directory_(directory), root_(new Identity("keepset test authority")) {
  AddExtension(root_->certificate, root_->certificate, NID_basic_constraints, "critical,CA:TRUE");
  root_->Sign(*root_, 1);
  const File file = Create(Path("ca.pem"));
  EXPECT_TRUE(file != nullptr && PEM_write_X509(file.get(), root_->certificate) == 1);
}

CertificateAuthority::~CertificateAuthority() { delete root_; }

void CertificateAuthority::Issue(const std::string& name) {
  const Identity identity(name);
  AddExtension(identity.certificate, root_->certificate, NID_subject_alt_name, "DNS:" + name);
  identity.Sign(*root_, 2);
  const File certificate = Create(Path(name + ".pem"));
  ASSERT_TRUE(certificate != nullptr &&
              PEM_write_X509(certificate.get(), identity.certificate) == 1);
  const File key = Create(Path(name + ".key"));
  ASSERT_TRUE(key != nullptr && PEM_write_PrivateKey(key.get(), identity.key, nullptr, nullptr, 0,
                                                     nullptr, nullptr) == 1);
}

}  // namespace keepset::fakes
