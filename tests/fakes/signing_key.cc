#include "tests/fakes/signing_key.h"

#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <fstream>

#include "gtest/gtest.h"

namespace keepset::fakes {
namespace {

std::string TextOf(BIO* bio) {
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio, &data);
  return std::string(data, size);
}

SigningKey Write(EVP_PKEY* key, const std::string& directory, const std::string& name) {
  SigningKey files = {directory + "/" + name + ".key", directory + "/" + name + ".pem", ""};
  BIO* const secret = BIO_new(BIO_s_mem());
  EXPECT_EQ(PEM_write_bio_PrivateKey(secret, key, nullptr, nullptr, 0, nullptr, nullptr), 1);
  std::ofstream(files.private_path, std::ios::binary) << TextOf(secret);
  BIO_free(secret);
  BIO* const open = BIO_new(BIO_s_mem());
  EXPECT_EQ(PEM_write_bio_PUBKEY(open, key), 1);
  files.public_pem = TextOf(open);
  std::ofstream(files.public_path, std::ios::binary) << files.public_pem;
  BIO_free(open);
  EVP_PKEY_free(key);
  return files;
}

}  // namespace

SigningKey NewSigningKey(const std::string& directory, const std::string& name) {
  return Write(EVP_PKEY_Q_keygen(nullptr, nullptr, "ED25519"), directory, name);
}

SigningKey NewForeignKey(const std::string& directory, const std::string& name) {
  return Write(EVP_EC_gen("P-256"), directory, name);
}

}  // namespace keepset::fakes
