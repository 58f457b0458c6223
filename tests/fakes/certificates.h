// A certificate authority that lives for one test.
#ifndef KEEPSET_TESTS_FAKES_CERTIFICATES_H_
#define KEEPSET_TESTS_FAKES_CERTIFICATES_H_

#include <string>

namespace keepset::fakes {

// Files in `directory`: ca.pem and, for each name issued, NAME.pem and NAME.key. P-256 keys, valid
// from an hour ago for a day.
class CertificateAuthority {
 public:
  explicit CertificateAuthority(const std::string& directory);
  ~CertificateAuthority();
  CertificateAuthority(const CertificateAuthority&) = delete;
  CertificateAuthority& operator=(const CertificateAuthority&) = delete;

  // A certificate for the DNS name `name`.
  void Issue(const std::string& name);

  std::string Path(const std::string& file) const { return directory_ + "/" + file; }

 private:
  struct Identity;
  const std::string directory_;
  Identity* const root_;
};

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_CERTIFICATES_H_
