#include "tables/json_text.h"

#include "nlohmann/json.hpp"

namespace keepset::tables {

std::string JsonQuoted(absl::string_view text) {
  using Json = nlohmann::json;
  return Json(std::string(text)).dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace keepset::tables
