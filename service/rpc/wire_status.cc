#include "service/rpc/wire_status.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "base/text.h"

namespace keepset::service {
namespace {

// A message quotes what the client sent. It travels in a trailer, which clients take up to 8 KiB
// of, and every byte of it may be escaped as three.
constexpr size_t kMaxMessageBytes = 2048;

}  // namespace

absl::Status PublicStatus(const absl::Status& status, absl::string_view correlation_id) {
  switch (status.code()) {
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
      return absl::InternalError(absl::StrCat("internal error, correlation id ", correlation_id));
    default:
      break;
  }
  const absl::string_view message = status.message();
  std::string text = ToText(message, kMaxMessageBytes);
  if (text == message) return status;
  if (message.size() > kMaxMessageBytes) text += "...";
  return {status.code(), text};
}

grpc::Status ToGrpcStatus(const absl::Status& public_status) {
  if (public_status.ok()) return grpc::Status::OK;
  // The canonical codes of both libraries are the same numbers.
  return {static_cast<grpc::StatusCode>(public_status.code()),
          std::string(public_status.message())};
}

}  // namespace keepset::service
