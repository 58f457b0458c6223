// What operators do to a RegistryState: each function checks completely, then changes `state`, and
// leaves it alone when it returns an error. Contracts of RegistryAuthority. Settle follows.
#ifndef KEEPSET_SERVICE_REGISTRY_REGISTRY_CHANGES_H_
#define KEEPSET_SERVICE_REGISTRY_REGISTRY_CHANGES_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "service/registry/registry_state.h"

namespace keepset::service {

inline constexpr absl::string_view kUploadSource = "upload";

// Each returns the name of the line it changed.
absl::StatusOr<std::string> ChangeActive(RegistryState& state, const TableRef& table,
                                         absl::string_view set_alias, absl::string_view actor,
                                         absl::Time now);
absl::StatusOr<std::string> ChangeToNewest(RegistryState& state, absl::string_view name);
absl::StatusOr<std::string> RollBack(RegistryState& state, absl::string_view name,
                                     absl::string_view actor, absl::Time now);
absl::StatusOr<std::string> ChangeCanary(RegistryState& state, const TableRef& table,
                                         int basis_points, absl::string_view salt);
absl::StatusOr<std::string> ChangeAlias(RegistryState& state, absl::string_view name,
                                        absl::string_view alias, const TableRef& table);
// Takes the upload away from its version; files belong to their source.
absl::StatusOr<std::string> DropUpload(RegistryState& state, const TableRef& table);

// AlreadyExists when the line has that version with other content.
absl::Status AddUpload(RegistryState& state, const SourceTable& table, absl::Time now);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_REGISTRY_CHANGES_H_
