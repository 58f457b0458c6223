// Which table, if any, is asked beside the one that decides an operation.
#ifndef KEEPSET_SERVICE_RPC_SHADOW_CHOICE_H_
#define KEEPSET_SERVICE_RPC_SHADOW_CHOICE_H_

#include <optional>

#include "absl/status/status.h"
#include "engine/operation_types.h"
#include "keepset/v1/compression.pb.h"
#include "tables/table_store.h"

namespace keepset::service {

// The server's own wish.
struct ShadowOptions {
  v1::TablePin table;
  int basis_points = 0;  // share of the operations in 1/100 percent
};

// Whether an operation with this id is among the server's share; the same ids on every server, and
// not those of any canary. Ids that are empty are not.
bool IsShadowed(const ShadowOptions& options, absl::string_view request_id);

// Sets spec.shadow_table for an operation whose table is resolved, by `query`. The request's own
// shadow_table wins over the server's wish.
//
// Nothing: nobody asks, or the server's wish names what there is not now, or the deciding table
// itself. Otherwise OK, or why the table asked for cannot be (as tables::ResolveTable).
std::optional<absl::Status> ChooseShadow(const v1::OperationSpec& wire,
                                         const ShadowOptions& options,
                                         const tables::TableSnapshot& snapshot,
                                         tables::TableQuery query, engine::OperationSpec& spec);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SHADOW_CHOICE_H_
