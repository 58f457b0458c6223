// The order of versions for people: runs of digits count as numbers.
#ifndef KEEPSET_SERVICE_REGISTRY_VERSION_ORDER_H_
#define KEEPSET_SERVICE_REGISTRY_VERSION_ORDER_H_

#include "absl/strings/string_view.h"
#include "tables/decision_table.h"

namespace keepset::service {

// "1.9" < "1.10" < "2"; digits before other characters; otherwise by bytes. A strict total order:
// "1" < "01", which count the same.
bool VersionLess(absl::string_view a, absl::string_view b);

// By created(), then VersionLess, then digest.
bool IsOlder(const tables::DecisionTable& a, const tables::DecisionTable& b);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_VERSION_ORDER_H_
