#include "tables/strict_json.h"
#include "tables/table_file.h"

namespace keepset::tables {

std::optional<absl::Time> TableCreated(const DecisionTable& table) {
  const nlohmann::json document = nlohmann::json::parse(table.metadata_json(), nullptr, false);
  if (!document.is_object() || !document.contains("provenance")) return std::nullopt;
  const nlohmann::json& provenance = document["provenance"];
  if (!provenance.is_object() || !provenance.contains("created")) return std::nullopt;
  const nlohmann::json& created = provenance["created"];
  absl::Time time;
  std::string error;
  if (!created.is_string() ||
      !absl::ParseTime(absl::RFC3339_full, created.get<std::string>(), &time, &error)) {
    return std::nullopt;
  }
  return time;
}

}  // namespace keepset::tables
