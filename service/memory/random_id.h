// Ids, tokens and their comparison: from the kernel's random source, never sequential.
#ifndef KEEPSET_SERVICE_MEMORY_RANDOM_ID_H_
#define KEEPSET_SERVICE_MEMORY_RANDOM_ID_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace keepset::service {

// Internal: the kernel has no random source.
absl::Status FillRandom(absl::Span<uint8_t> bytes);

// 128 random bits as 32 hex digits.
absl::StatusOr<std::string> RandomId();

// Takes the same time wherever the first difference lies. Sizes are not secret.
bool ConstantTimeEqual(absl::Span<const uint8_t> a, absl::Span<const uint8_t> b);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_RANDOM_ID_H_
