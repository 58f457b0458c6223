// An Ed25519 key pair as PEM files, fresh for each test.
#ifndef KEEPSET_TESTS_FAKES_SIGNING_KEY_H_
#define KEEPSET_TESTS_FAKES_SIGNING_KEY_H_

#include <string>

namespace keepset::fakes {

struct SigningKey {
  std::string private_path;  // NAME.key
  std::string public_path;   // NAME.pem
  std::string public_pem;
};

// Writes both files into `directory`.
SigningKey NewSigningKey(const std::string& directory, const std::string& name);

// Files of another algorithm (P-256), same names.
SigningKey NewForeignKey(const std::string& directory, const std::string& name);

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_SIGNING_KEY_H_
