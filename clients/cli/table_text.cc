#include "clients/cli/table_text.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/text.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;
using Lines = std::vector<std::pair<std::string, std::string>>;

void Flatten(const std::string& prefix, const Json& value, Lines& lines) {
  const bool objects = value.is_array() && !value.empty() && value.front().is_object();
  if ((value.is_object() && !value.empty()) || objects) {
    size_t index = 0;
    for (const auto& [key, child] : value.items()) {
      const std::string name = objects ? absl::StrCat(index++) : key;
      Flatten(prefix.empty() ? name : absl::StrCat(prefix, ".", name), child, lines);
    }
    return;
  }
  lines.emplace_back(
      ToPrintable(prefix),
      ToPrintable(value.is_string() ? value.get<std::string>()
                                    : value.dump(-1, ' ', false, Json::error_handler_t::replace)));
}

}  // namespace

std::string TableText(absl::string_view file, absl::string_view inspect_json) {
  Lines lines;
  Flatten("", Json::parse(inspect_json.begin(), inspect_json.end(), nullptr, false), lines);
  size_t width = 0;
  for (const auto& [key, value] : lines) width = std::max(width, key.size());
  std::string out = absl::StrCat(file, "\n");
  for (const auto& [key, value] : lines) {
    absl::StrAppendFormat(&out, "  %-*s  %s\n", static_cast<int>(width), key, value);
  }
  return out;
}

}  // namespace keepset::cli
