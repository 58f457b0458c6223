// Signed tables only: what stands between every source or upload and the loader that makes tables
// of bytes. Wrap the server's one loader; sources and TableService.Load fill
// TableCandidate::signature and need not know whether anybody looks at it.
#ifndef KEEPSET_SERVICE_REGISTRY_SIGNATURE_LOADER_H_
#define KEEPSET_SERVICE_REGISTRY_SIGNATURE_LOADER_H_

#include <cstddef>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "service/registry/table_loader.h"
#include "tables/table_signature.h"

namespace keepset::service {

enum class SignatureRule {
  kWhereSigned,  // a table without a signature passes, one with a wrong signature never does
  kRequired,
};

// The rule itself, for whoever judges a table without loading it (Validate, recovery). OK, or
// PermissionDenied: no signature, or none of a trusted key for these bytes. InvalidArgument: no
// signature at all, in form. Without `keys` nobody can judge: OK unless kRequired. `label` begins
// every message.
absl::Status CheckSignature(absl::Span<const std::byte> bytes, absl::string_view signature,
                            absl::string_view label, const tables::TrustedKeys& keys,
                            SignatureRule rule);

// Checks, then hands on to `next`. Thread-safe as `next` is.
std::unique_ptr<TableLoader> NewSignatureLoader(std::unique_ptr<TableLoader> next,
                                                tables::TrustedKeys keys, SignatureRule rule);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_SIGNATURE_LOADER_H_
