// The W3C trace context a call came in with (https://www.w3.org/TR/trace-context/), as far as a log
// line needs it. tracestate is not looked at.
#ifndef KEEPSET_SERVICE_RPC_TRACE_CONTEXT_H_
#define KEEPSET_SERVICE_RPC_TRACE_CONTEXT_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace keepset::service {

struct TraceContext {
  std::string trace_id;  // 32 hexadecimal digits
  std::string span_id;   // 16: the caller's span

  bool operator==(const TraceContext&) const = default;
};

// The value of one `traceparent` header. Nothing for what the recommendation calls invalid: another
// length, capitals, version ff, ids of zeros. Later versions are read as far as version 00 goes.
std::optional<TraceContext> ParseTraceparent(absl::string_view header);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_TRACE_CONTEXT_H_
