// Text inside JSON that other rooms put together.
#ifndef KEEPSET_TABLES_JSON_TEXT_H_
#define KEEPSET_TABLES_JSON_TEXT_H_

#include <string>

#include "absl/strings/string_view.h"

namespace keepset::tables {

// `text` as a JSON string, quotes included; bytes that are not UTF-8 become U+FFFD.
std::string JsonQuoted(absl::string_view text);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_JSON_TEXT_H_
