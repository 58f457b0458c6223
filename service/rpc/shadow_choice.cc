#include "service/rpc/shadow_choice.h"

#include "service/rpc/request_codec.h"

namespace keepset::service {
namespace {

constexpr absl::string_view kSalt = "shadow";

}  // namespace

bool IsShadowed(const ShadowOptions& options, absl::string_view request_id) {
  return !request_id.empty() && tables::CanaryBucket(kSalt, request_id) < options.basis_points;
}

std::optional<absl::Status> ChooseShadow(const v1::OperationSpec& wire,
                                         const ShadowOptions& options,
                                         const tables::TableSnapshot& snapshot,
                                         tables::TableQuery query, engine::OperationSpec& spec) {
  const bool is_asked = wire.has_shadow_table();
  if (!is_asked && !IsShadowed(options, wire.request_id())) return std::nullopt;
  ApplyPin(is_asked ? wire.shadow_table() : options.table, query);
  if (query.name.empty() && query.digest.empty()) query.name = spec.table->identity().name;
  // The active version of a line, whatever side of a canary the operation is on.
  query.request_id.clear();
  const absl::StatusOr<tables::ResolvedTable> resolved = tables::ResolveTable(snapshot, query);
  if (!resolved.ok()) {
    // There is not always a canary.
    if (!is_asked && absl::IsNotFound(resolved.status())) return std::nullopt;
    return resolved.status();
  }
  if (!is_asked && resolved->table->identity() == spec.table->identity()) return std::nullopt;
  spec.shadow_table = resolved->table;
  return absl::OkStatus();
}

}  // namespace keepset::service
