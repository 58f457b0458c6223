// The table sources of this build, from sources.def.
#ifndef KEEPSET_SERVICE_REGISTRY_SOURCE_REGISTRY_H_
#define KEEPSET_SERVICE_REGISTRY_SOURCE_REGISTRY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "service/registry/table_source.h"
#include "tables/table_store.h"

namespace keepset::service {

std::vector<std::string> ListTableSources();

// NotFound: no source of that kind, naming those there are. Lifetimes as for NewDirectorySource.
absl::StatusOr<std::unique_ptr<TableSource>> NewTableSource(absl::string_view kind,
                                                            const DirectorySourceOptions& options,
                                                            tables::TableStore& store,
                                                            const Clock& clock,
                                                            TableSourceObserver* observer);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_SOURCE_REGISTRY_H_
