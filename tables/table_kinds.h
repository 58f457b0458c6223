// The kinds of table this version can read. A new kind is one parser and one line in
// table_kinds.cc; reading, registry, inspect and diff know no kind by name.
#ifndef KEEPSET_TABLES_TABLE_KINDS_H_
#define KEEPSET_TABLES_TABLE_KINDS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "nlohmann/json.hpp"
#include "tables/decision_table.h"
#include "tables/observation_heads_table.h"
#include "tables/safetensors.h"

namespace keepset::tables {

// The part of a table file that all kinds share, checked.
struct TableHeader {
  TableIdentity identity;
  ModelFingerprint model;
  std::string provenance_source;
  absl::Time created = absl::InfinitePast();
  std::string metadata_json;
  nlohmann::json document;
  std::vector<std::string> ignored;
};

struct TableKind {
  absl::string_view name;
  // JSON keys and tensors of this kind; others are listed as ignored.
  std::vector<absl::string_view> keys;
  std::vector<absl::string_view> tensors;
  // The table may keep views into `file`, and then keeps the file.
  absl::StatusOr<std::shared_ptr<const DecisionTable>> (*parse)(
      std::shared_ptr<const SafetensorsFile> file, TableHeader header);
};

std::vector<TableKind> TableKinds();

absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseCompilerKvTable(
    std::shared_ptr<const SafetensorsFile> file, TableHeader header);
absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseObservationHeadsTable(
    std::shared_ptr<const SafetensorsFile> file, TableHeader header);

// One observation as files state it, checked against the model; `index` is its place in the tensors
// heads, rows and weights.
absl::StatusOr<HeadObservation> CheckedObservation(const SafetensorsFile& file,
                                                   const ModelFingerprint& model, std::size_t index,
                                                   int64_t layer, int64_t head, int64_t rows,
                                                   float weight);
// Key `probe` of `object`, if it is there.
absl::StatusOr<std::optional<ObservationProbe>> ReadObservationProbe(const nlohmann::json& object,
                                                                     absl::string_view where);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_TABLE_KINDS_H_
