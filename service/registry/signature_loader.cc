#include "service/registry/signature_loader.h"

#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

class SignatureLoader final : public TableLoader {
 public:
  SignatureLoader(std::unique_ptr<TableLoader> next, tables::TrustedKeys keys, SignatureRule rule)
      : next_(std::move(next)), keys_(std::move(keys)), rule_(rule) {}

  absl::StatusOr<TablePtr> LoadTable(TableCandidate candidate) override {
    KEEPSET_RETURN_IF_ERROR(CheckSignature(
        absl::MakeConstSpan(reinterpret_cast<const std::byte*>(candidate.bytes.data()),
                            candidate.bytes.size()),
        candidate.signature, candidate.label, keys_, rule_));
    return next_->LoadTable(std::move(candidate));
  }

 private:
  const std::unique_ptr<TableLoader> next_;
  const tables::TrustedKeys keys_;
  const SignatureRule rule_;
};

}  // namespace

absl::Status CheckSignature(absl::Span<const std::byte> bytes, absl::string_view signature,
                            absl::string_view label, const tables::TrustedKeys& keys,
                            SignatureRule rule) {
  if (signature.empty()) {
    if (rule == SignatureRule::kWhereSigned) return absl::OkStatus();
    return absl::PermissionDeniedError(
        absl::StrCat(label, ": no signature, want one by a trusted key"));
  }
  if (keys.empty() && rule == SignatureRule::kWhereSigned) return absl::OkStatus();
  return keys.Verify(bytes, signature, label);
}

std::unique_ptr<TableLoader> NewSignatureLoader(std::unique_ptr<TableLoader> next,
                                                tables::TrustedKeys keys, SignatureRule rule) {
  return std::make_unique<SignatureLoader>(std::move(next), std::move(keys), rule);
}

}  // namespace keepset::service
