// What a server's table registry says, for people and for scripts.
#ifndef KEEPSET_CLIENTS_CLI_REGISTRY_TEXT_H_
#define KEEPSET_CLIENTS_CLI_REGISTRY_TEXT_H_

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "clients/cpp/table_client.h"

namespace keepset::cli {

// "NAME", "NAME@VERSION", "NAME@sha256:HEX" or "NAME:ALIAS". Usage error: anything else.
absl::StatusOr<client::TableRef> ParseTableRef(absl::string_view text);

// One row per version under a heading, then sources that are not well and refused tables.
std::string RegistryText(const client::TableList& list);
// "llama-8b  revision 12  active 4  canary 5 10%"
std::string LineText(const client::TableLine& line);

// One line; bytes that are not UTF-8 are replaced.
std::string JsonText(const nlohmann::ordered_json& json);
nlohmann::ordered_json RegistryJson(const client::TableList& list);
nlohmann::ordered_json LineJson(const client::TableLine& line);
nlohmann::ordered_json VersionJson(const client::TableVersion& version);
nlohmann::ordered_json ChangeJson(const client::TableChange& change);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_REGISTRY_TEXT_H_
