// Where a source of the conformance suite finds its tables, and how somebody puts one there. A new
// source brings its own.
#ifndef KEEPSET_TESTS_SERVICE_REGISTRY_TABLE_ORIGIN_H_
#define KEEPSET_TESTS_SERVICE_REGISTRY_TABLE_ORIGIN_H_

#include <memory>
#include <string>

#include "service/registry/table_source.h"

namespace keepset::service {

class TableOrigin {
 public:
  virtual ~TableOrigin() = default;
  virtual TableSourceOptions Options() const = 0;
  // What the table named `table` is from now on, whole and at once, and what is served under that
  // name; what it was before is gone. Damaged bytes take the place of the table's bytes.
  virtual void Place(const std::string& table, const std::string& bytes) = 0;
  // How a message names the place of a damaged `table`.
  virtual std::string PlaceOf(const std::string& table) const = 0;
};

// For every kind of sources.def; a test failure and nullptr for one without.
std::unique_ptr<TableOrigin> NewTableOrigin(const std::string& kind);

}  // namespace keepset::service

#endif  // KEEPSET_TESTS_SERVICE_REGISTRY_TABLE_ORIGIN_H_
