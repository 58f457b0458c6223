// JSON from files we do not trust, and typed access to its fields. For .cc files only: nlohmann's
// types stay out of public headers.
//
// Errors are InvalidArgument and read "<where>: <field>=<value>, want <what>".
#ifndef KEEPSET_TABLES_STRICT_JSON_H_
#define KEEPSET_TABLES_STRICT_JSON_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace keepset::tables {

// Deeper documents are refused: recursive users of a document (dump, compare) must stay bounded.
inline constexpr int kMaxJsonDepth = 32;

// One JSON document. Refuses duplicate keys at any level, nesting beyond kMaxJsonDepth, and
// anything but white space behind the document.
absl::StatusOr<nlohmann::json> ParseStrictJson(absl::string_view text, absl::string_view where);

// ParseStrictJson, and the document must be an object.
absl::StatusOr<nlohmann::json> ParseStrictJsonObject(absl::string_view text,
                                                     absl::string_view where);

// The value as one line for a message, cut after about 80 characters.
std::string PreviewJson(const nlohmann::json& value);

absl::Status FieldError(absl::string_view where, absl::string_view field, absl::string_view value,
                        absl::string_view want);

// Readers of `object[key]`. A missing key is an error, except for the Optional forms, which return
// nullopt for a missing or null key.
absl::StatusOr<std::string> StringField(const nlohmann::json& object, absl::string_view key,
                                        absl::string_view where);
absl::StatusOr<int64_t> IntField(const nlohmann::json& object, absl::string_view key, int64_t low,
                                 int64_t high, absl::string_view where);
absl::StatusOr<double> FiniteField(const nlohmann::json& object, absl::string_view key,
                                   absl::string_view where);
absl::StatusOr<nlohmann::json> ObjectField(const nlohmann::json& object, absl::string_view key,
                                           absl::string_view where);
absl::StatusOr<std::optional<std::string>> OptionalStringField(const nlohmann::json& object,
                                                               absl::string_view key,
                                                               absl::string_view where);
absl::StatusOr<std::optional<int64_t>> OptionalIntField(const nlohmann::json& object,
                                                        absl::string_view key, int64_t low,
                                                        int64_t high, absl::string_view where);
absl::StatusOr<std::optional<double>> OptionalFiniteField(const nlohmann::json& object,
                                                          absl::string_view key,
                                                          absl::string_view where);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_STRICT_JSON_H_
