#include "service/rpc/trace_context.h"

#include <algorithm>

namespace keepset::service {
namespace {

// version "-" trace-id "-" parent-id "-" trace-flags
constexpr size_t kVersion = 2;
constexpr size_t kTraceId = 32;
constexpr size_t kSpanId = 16;
constexpr size_t kFlags = 2;
constexpr size_t kLength = kVersion + 1 + kTraceId + 1 + kSpanId + 1 + kFlags;

bool IsLowerHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsId(absl::string_view text) {
  return IsLowerHex(text) && text.find_first_not_of('0') != absl::string_view::npos;
}

}  // namespace

std::optional<TraceContext> ParseTraceparent(absl::string_view header) {
  if (header.size() < kLength) return std::nullopt;
  const absl::string_view version = header.substr(0, kVersion);
  if (!IsLowerHex(version) || version == "ff") return std::nullopt;
  if (header.size() > kLength && (version == "00" || header[kLength] != '-')) return std::nullopt;
  const absl::string_view trace_id = header.substr(kVersion + 1, kTraceId);
  const absl::string_view span_id = header.substr(kVersion + 1 + kTraceId + 1, kSpanId);
  const absl::string_view flags = header.substr(kLength - kFlags, kFlags);
  for (const size_t dash : {kVersion, kVersion + 1 + kTraceId, kLength - kFlags - 1}) {
    if (header[dash] != '-') return std::nullopt;
  }
  if (!IsId(trace_id) || !IsId(span_id) || !IsLowerHex(flags)) return std::nullopt;
  return TraceContext{std::string(trace_id), std::string(span_id)};
}

}  // namespace keepset::service
