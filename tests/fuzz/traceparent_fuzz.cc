// What is accepted holds two ids in the form a log line may carry.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>

#include "absl/strings/string_view.h"
#include "service/rpc/trace_context.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto context = keepset::service::ParseTraceparent(
      absl::string_view(reinterpret_cast<const char*>(data), size));
  if (!context.has_value()) return 0;
  for (const absl::string_view id :
       {absl::string_view(context->trace_id), absl::string_view(context->span_id)}) {
    if (id.find_first_not_of("0123456789abcdef") != absl::string_view::npos) abort();
  }
  if (context->trace_id.size() != 32 || context->span_id.size() != 16) abort();
  return 0;
}
