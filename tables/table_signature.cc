#include "tables/table_signature.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/file_bytes.h"
#include "tables/safetensors.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

constexpr size_t kSignatureBytes = 64;
// A PEM block of a public key has 113 characters: a thousand of them.
constexpr size_t kMaxKeyFileBytes = size_t{128} << 10;

struct BioDeleter {
  void operator()(BIO* bio) const { BIO_free(bio); }
};
struct ContextDeleter {
  void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};
struct PkeyDeleter {
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
};
using Pkey = std::unique_ptr<EVP_PKEY, PkeyDeleter>;
using Bio = std::unique_ptr<BIO, BioDeleter>;
using Context = std::unique_ptr<EVP_MD_CTX, ContextDeleter>;

// Without this OpenSSL would ask the terminal.
int NoPassword(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*user*/) { return -1; }

const unsigned char* Unsigned(const void* bytes) {
  return static_cast<const unsigned char*>(bytes);
}

bool IsEd25519(const EVP_PKEY* key) { return EVP_PKEY_base_id(key) == EVP_PKEY_ED25519; }

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, size_t most,
                                          absl::string_view what) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<FileBytes> file,
                           FileBytes::Open(path, ReadMode::kCopy));
  if (file->bytes().size() > most) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", file->bytes().size(),
                                                   " bytes, want ", what, " of at most ", most));
  }
  return std::string(reinterpret_cast<const char*>(file->bytes().data()), file->bytes().size());
}

absl::StatusOr<std::string> DecodeSignature(absl::string_view signature, absl::string_view label) {
  if (signature.size() == kSignatureBytes) return std::string(signature);
  std::string decoded;
  if (signature.size() <= kMaxSignatureFileBytes &&
      absl::Base64Unescape(absl::StripAsciiWhitespace(signature), &decoded) &&
      decoded.size() == kSignatureBytes) {
    return decoded;
  }
  return absl::InvalidArgumentError(absl::StrCat(label, ": a signature of ", signature.size(),
                                                 " bytes, want ", kSignatureBytes,
                                                 " bytes or their base64"));
}

// nullptr: there is no further PEM block, or a damaged one; OpenSSL's error queue says which.
absl::StatusOr<Pkey> NextPublicKey(BIO* bio, absl::string_view label) {
  char* name = nullptr;
  char* header = nullptr;
  unsigned char* der = nullptr;
  long size = 0;
  if (PEM_read_bio(bio, &name, &header, &der, &size) != 1) return nullptr;
  const absl::Cleanup free_all = [&] {
    OPENSSL_free(name);
    OPENSSL_free(header);
    OPENSSL_free(der);
  };
  const unsigned char* at = der;
  Pkey key(absl::string_view(name) == PEM_STRING_PUBLIC ? d2i_PUBKEY(nullptr, &at, size) : nullptr);
  ERR_clear_error();
  if (key != nullptr && IsEd25519(key.get())) return key;
  return absl::InvalidArgumentError(absl::StrCat(
      label, ": a PEM block \"", absl::CHexEscape(name), "\"",
      key == nullptr ? "" : absl::StrCat(" of type ", EVP_PKEY_get0_type_name(key.get())),
      ", want PUBLIC KEY of type ED25519"));
}

}  // namespace

struct TrustedKeys::Key {
  Pkey pkey;
};

absl::StatusOr<TrustedKeys> TrustedKeys::Parse(absl::string_view pem, absl::string_view label) {
  const Bio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  if (bio == nullptr) return absl::ResourceExhaustedError("no memory for a key");
  TrustedKeys trusted;
  while (true) {
    KEEPSET_ASSIGN_OR_RETURN(Pkey key, NextPublicKey(bio.get(), label));
    if (key == nullptr) break;
    auto owned = std::make_shared<Key>();
    owned->pkey = std::move(key);
    trusted.keys_.push_back(std::move(owned));
  }
  // Anything but the end of the file stopped the loop: a damaged block must not look like no key.
  const bool at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  ERR_clear_error();
  if (trusted.empty() || !at_end) {
    return absl::InvalidArgumentError(
        absl::StrCat(label, ": key ", trusted.keys_.size() + 1,
                     " cannot be read, want PEM blocks \"BEGIN PUBLIC KEY\" of Ed25519 keys"));
  }
  return trusted;
}

absl::StatusOr<TrustedKeys> TrustedKeys::Read(absl::Span<const std::string> paths) {
  TrustedKeys all;
  for (const std::string& path : paths) {
    KEEPSET_ASSIGN_OR_RETURN(const std::string pem,
                             ReadSmallFile(path, kMaxKeyFileBytes, "public keys"));
    KEEPSET_ASSIGN_OR_RETURN(const TrustedKeys some, Parse(pem, path));
    all.keys_.insert(all.keys_.end(), some.keys_.begin(), some.keys_.end());
  }
  return all;
}

absl::Status TrustedKeys::Verify(absl::Span<const std::byte> bytes, absl::string_view signature,
                                 absl::string_view label) const {
  KEEPSET_ASSIGN_OR_RETURN(const std::string raw, DecodeSignature(signature, label));
  for (const std::shared_ptr<const Key>& key : keys_) {
    const Context context(EVP_MD_CTX_new());
    if (context == nullptr ||
        EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key->pkey.get()) != 1) {
      ERR_clear_error();
      return absl::InternalError("Ed25519 is not available");
    }
    const int verdict = EVP_DigestVerify(context.get(), Unsigned(raw.data()), raw.size(),
                                         Unsigned(bytes.data()), bytes.size());
    ERR_clear_error();
    if (verdict == 1) return absl::OkStatus();
  }
  return absl::PermissionDeniedError(absl::StrCat(
      label, ": the signature is of other content or by somebody else, want one by any of ",
      keys_.size(), " trusted keys"));
}

absl::StatusOr<std::string> SignBytes(absl::Span<const std::byte> bytes,
                                      const std::string& key_path) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string pem,
                           ReadSmallFile(key_path, kMaxKeyFileBytes, "a private key"));
  const Bio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  if (bio == nullptr) return absl::ResourceExhaustedError("no memory for a key");
  const Pkey key(PEM_read_bio_PrivateKey(bio.get(), nullptr, NoPassword, nullptr));
  ERR_clear_error();
  if (key == nullptr || !IsEd25519(key.get())) {
    return absl::InvalidArgumentError(absl::StrCat(
        key_path, ": ", key == nullptr ? "no" : EVP_PKEY_get0_type_name(key.get()),
        " private key, want the PEM of an Ed25519 one that is not encrypted (openssl genpkey "
        "-algorithm ed25519)"));
  }
  const Context context(EVP_MD_CTX_new());
  std::string signature(kSignatureBytes, '\0');
  size_t size = signature.size();
  const bool is_signed =
      context != nullptr &&
      EVP_DigestSignInit(context.get(), nullptr, nullptr, nullptr, key.get()) == 1 &&
      EVP_DigestSign(context.get(), reinterpret_cast<unsigned char*>(signature.data()), &size,
                     Unsigned(bytes.data()), bytes.size()) == 1 &&
      size == kSignatureBytes;
  ERR_clear_error();
  if (!is_signed) return absl::InternalError("Ed25519 is not available");
  return signature;
}

absl::Status SignTableFile(const std::string& table_path, const std::string& key_path) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<FileBytes> file,
                           FileBytes::Open(table_path, ReadMode::kCopy));
  KEEPSET_RETURN_IF_ERROR(ParseTable(file->bytes(), table_path).status());
  KEEPSET_ASSIGN_OR_RETURN(const std::string signature, SignBytes(file->bytes(), key_path));
  return WriteFileAtomically(SignaturePath(table_path), signature);
}

absl::Status VerifyTableFile(const std::string& table_path, const TrustedKeys& keys) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<FileBytes> file,
                           FileBytes::Open(table_path, ReadMode::kCopy));
  KEEPSET_ASSIGN_OR_RETURN(
      const std::string signature,
      ReadSmallFile(SignaturePath(table_path), kMaxSignatureFileBytes, "a signature"));
  return keys.Verify(file->bytes(), signature, table_path);
}

}  // namespace keepset::tables
