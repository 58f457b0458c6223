// What a table of any kind keeps of its file, and answers from it. Private to tables/.
#ifndef KEEPSET_TABLES_FILE_TABLE_H_
#define KEEPSET_TABLES_FILE_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "tables/table_kinds.h"
#include "tables/table_tensors.h"

namespace keepset::tables {

// `Kind`: CompilerKvTable or ObservationHeadsTable; a subclass adds what is the kind's own.
template <typename Kind>
class FileTable : public Kind {
 public:
  FileTable(std::shared_ptr<const SafetensorsFile> file, TableHeader header, TableBudgets budgets)
      : file_(std::move(file)), header_(std::move(header)), budgets_(std::move(budgets)) {}

  const TableIdentity& identity() const override { return header_.identity; }
  const ModelFingerprint& model() const override { return header_.model; }
  absl::string_view provenance_source() const override { return header_.provenance_source; }
  const std::string& metadata_json() const override { return header_.metadata_json; }
  const std::vector<std::string>& ignored() const override { return header_.ignored; }
  absl::Time created() const override { return header_.created; }
  absl::Span<const std::byte> file_bytes() const override { return file_->bytes(); }

  absl::Span<const int64_t> budgets() const override { return budgets_.all; }
  std::optional<int64_t> default_budget() const override { return budgets_.by_default; }
  absl::StatusOr<int64_t> DefaultBudget() const override {
    if (budgets_.by_default.has_value()) return *budgets_.by_default;
    if (budgets_.all.size() == 1) return budgets_.all[0];
    const std::string listed =
        budgets_.all.empty() ? ""
                             : absl::StrCat(" (compiled: ", absl::StrJoin(budgets_.all, ", "), ")");
    return absl::InvalidArgumentError(
        absl::StrCat(Name(), ": has no default_budget, want a budget in the request", listed));
  }

 protected:
  // "table NAME@VERSION".
  std::string Name() const {
    return absl::StrCat("table ", header_.identity.name, "@", header_.identity.version);
  }

 private:
  const std::shared_ptr<const SafetensorsFile> file_;  // views of the kind's values point into it
  const TableHeader header_;
  const TableBudgets budgets_;
};

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_FILE_TABLE_H_
