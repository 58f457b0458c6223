// Early return for absl::Status and absl::StatusOr.
//
// KEEPSET_RETURN_IF_ERROR(expr)               returns the status of `expr` unless it is OK
// KEEPSET_ASSIGN_OR_RETURN(lhs, expr)         returns the status of `expr`, or moves its value to
// lhs
#ifndef KEEPSET_BASE_STATUS_MACROS_H_
#define KEEPSET_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define KEEPSET_RETURN_IF_ERROR(expr)                                                         \
  do {                                                                                        \
    if (absl::Status keepset_status_ = (expr); !keepset_status_.ok()) return keepset_status_; \
  } while (false)

#define KEEPSET_CONCAT_INNER_(a, b) a##b
#define KEEPSET_CONCAT_(a, b) KEEPSET_CONCAT_INNER_(a, b)

#define KEEPSET_ASSIGN_OR_RETURN(lhs, expr) \
  KEEPSET_ASSIGN_OR_RETURN_(KEEPSET_CONCAT_(keepset_status_or_, __LINE__), lhs, expr)
#define KEEPSET_ASSIGN_OR_RETURN_(result, lhs, expr)   \
  auto result = (expr);                                \
  if (!result.ok()) return std::move(result).status(); \
  lhs = std::move(result).value()

#endif  // KEEPSET_BASE_STATUS_MACROS_H_
