// The table sources of this build, from sources.def.
#ifndef KEEPSET_SERVICE_REGISTRY_SOURCE_REGISTRY_H_
#define KEEPSET_SERVICE_REGISTRY_SOURCE_REGISTRY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/registry/table_source.h"

namespace keepset::service {

std::vector<std::string> ListTableSources();

// NotFound: no source of that kind, naming those there are.
absl::StatusOr<std::unique_ptr<TableSource>> NewTableSource(absl::string_view kind,
                                                            const TableSourceOptions& options,
                                                            const TableSourceContext& context);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_SOURCE_REGISTRY_H_
