#include "service/registry/source_registry.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::service {

#define KEEPSET_TABLE_SOURCE(kind, factory)                               \
  std::unique_ptr<TableSource> factory(const TableSourceOptions& options, \
                                       const TableSourceContext& context);
#include "service/registry/sources.def"
#undef KEEPSET_TABLE_SOURCE

std::vector<std::string> ListTableSources() {
  return {
#define KEEPSET_TABLE_SOURCE(kind, factory) #kind,
#include "service/registry/sources.def"
#undef KEEPSET_TABLE_SOURCE
  };
}

absl::StatusOr<std::unique_ptr<TableSource>> NewTableSource(absl::string_view kind,
                                                            const TableSourceOptions& options,
                                                            const TableSourceContext& context) {
#define KEEPSET_TABLE_SOURCE(listed_kind, factory) \
  if (kind == #listed_kind) return factory(options, context);
#include "service/registry/sources.def"
#undef KEEPSET_TABLE_SOURCE
  return absl::NotFoundError(
      absl::StrCat("table source \"", kind,
                   "\" is not listed, want one of: ", absl::StrJoin(ListTableSources(), ", ")));
}

}  // namespace keepset::service
