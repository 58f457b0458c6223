// Detached Ed25519 signatures (RFC 8032, pure) over the bytes of a table file, by OpenSSL. The same
// signature as `openssl pkeyutl -sign -rawin -inkey KEY.pem -in TABLE -out TABLE.sig` makes.
#ifndef KEEPSET_TABLES_TABLE_SIGNATURE_H_
#define KEEPSET_TABLES_TABLE_SIGNATURE_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace keepset::tables {

// More than any spelling of a signature, less than anything that would hurt to read.
inline constexpr size_t kMaxSignatureFileBytes = 1024;

// Where the signature of a table file lies.
inline std::string SignaturePath(absl::string_view table_path) {
  return std::string(table_path) + ".sig";
}

// Public keys whose signatures count. Immutable, cheap to copy, thread-safe.
class TrustedKeys {
 public:
  TrustedKeys() = default;  // nobody

  // PEM files of Ed25519 public keys, one or more each. NotFound, PermissionDenied: the file.
  // InvalidArgument: something else in it.
  static absl::StatusOr<TrustedKeys> Read(absl::Span<const std::string> paths);
  static absl::StatusOr<TrustedKeys> Parse(absl::string_view pem, absl::string_view label);

  bool empty() const { return keys_.empty(); }

  // `signature`: 64 bytes as they are, or their base64 with or without a newline.
  // InvalidArgument: no such thing. PermissionDenied: none of the keys made it for these bytes.
  absl::Status Verify(absl::Span<const std::byte> bytes, absl::string_view signature,
                      absl::string_view label) const;

 private:
  struct Key;
  std::vector<std::shared_ptr<const Key>> keys_;
};

// The 64 bytes. `key_path`: PEM of an Ed25519 private key, not encrypted. NotFound,
// PermissionDenied: the file. InvalidArgument: another key, or none.
absl::StatusOr<std::string> SignBytes(absl::Span<const std::byte> bytes,
                                      const std::string& key_path);

// Writes SignaturePath(table_path), after the table itself was validated.
absl::Status SignTableFile(const std::string& table_path, const std::string& key_path);

// Reads both files. NotFound: table or signature is missing; otherwise as Verify.
absl::Status VerifyTableFile(const std::string& table_path, const TrustedKeys& keys);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_TABLE_SIGNATURE_H_
