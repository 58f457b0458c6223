#include "tables/strict_json.h"

#include <cmath>
#include <cstddef>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

// nlohmann's document type keeps the last of two equal keys without a word, so duplicates and depth
// are judged on the event stream, before a document is built.
class StrictnessChecker final : public nlohmann::json_sax<Json> {
 public:
  const std::string& problem() const { return problem_; }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }

  bool start_object(std::size_t) override { return Enter(); }
  bool end_object() override { return Leave(); }
  bool start_array(std::size_t) override { return Enter(); }
  bool end_array() override { return Leave(); }

  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    problem_ = absl::StrCat("duplicate key \"", absl::CHexEscape(name.substr(0, 80)),
                            "\", want every key once");
    return false;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    problem_ = absl::StrCat("not JSON at byte ", position, ", want a JSON document");
    return false;
  }

 private:
  bool Enter() {
    if (keys_.size() >= kMaxJsonDepth) {
      problem_ = absl::StrCat("nested deeper than ", kMaxJsonDepth, " levels, want at most ",
                              kMaxJsonDepth);
      return false;
    }
    keys_.emplace_back();
    return true;
  }
  bool Leave() {
    keys_.pop_back();
    return true;
  }

  std::vector<absl::flat_hash_set<std::string>> keys_;
  std::string problem_;
};

const Json* Find(const Json& object, absl::string_view key) {
  const auto it = object.find(std::string(key));
  return it == object.end() ? nullptr : &*it;
}

const Json* FindNonNull(const Json& object, absl::string_view key) {
  const Json* value = Find(object, key);
  return value != nullptr && value->is_null() ? nullptr : value;
}

absl::Status WantError(const Json* value, absl::string_view key, absl::string_view want,
                       absl::string_view where) {
  return FieldError(where, key, value == nullptr ? "(missing)" : PreviewJson(*value), want);
}

std::string IntRange(int64_t low, int64_t high) {
  return absl::StrCat("an integer in ", low, "..", high);
}

}  // namespace

absl::StatusOr<Json> ParseStrictJson(absl::string_view text, absl::string_view where) {
  StrictnessChecker checker;
  if (!Json::sax_parse(text.begin(), text.end(), &checker)) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", checker.problem()));
  }
  Json document = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (document.is_discarded()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": not JSON, want a JSON document"));
  }
  return document;
}

absl::StatusOr<Json> ParseStrictJsonObject(absl::string_view text, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(Json document, ParseStrictJson(text, where));
  if (!document.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": ", PreviewJson(document), ", want a JSON object"));
  }
  return document;
}

std::string PreviewJson(const Json& value) {
  constexpr std::size_t kMaxBytes = 80;
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
  if (text.size() > kMaxBytes) {
    text.resize(kMaxBytes);
    text += "...";
  }
  return text;
}

absl::Status FieldError(absl::string_view where, absl::string_view field, absl::string_view value,
                        absl::string_view want) {
  return absl::InvalidArgumentError(absl::StrCat(where, ": ", field, "=", value, ", want ", want));
}

absl::StatusOr<std::string> StringField(const Json& object, absl::string_view key,
                                        absl::string_view where) {
  const Json* value = Find(object, key);
  if (value == nullptr || !value->is_string()) return WantError(value, key, "a string", where);
  return value->get<std::string>();
}

absl::StatusOr<int64_t> IntField(const Json& object, absl::string_view key, int64_t low,
                                 int64_t high, absl::string_view where) {
  const Json* value = Find(object, key);
  if (value == nullptr || !value->is_number_integer()) {
    return WantError(value, key, IntRange(low, high), where);
  }
  // Unsigned values beyond int64 would wrap.
  if (value->is_number_unsigned() && value->get<uint64_t>() > INT64_MAX) {
    return WantError(value, key, IntRange(low, high), where);
  }
  const int64_t number = value->get<int64_t>();
  if (number < low || number > high) return WantError(value, key, IntRange(low, high), where);
  return number;
}

absl::StatusOr<double> FiniteField(const Json& object, absl::string_view key,
                                   absl::string_view where) {
  const Json* value = Find(object, key);
  if (value == nullptr || !value->is_number() || !std::isfinite(value->get<double>())) {
    return WantError(value, key, "a finite number", where);
  }
  return value->get<double>();
}

absl::StatusOr<Json> ObjectField(const Json& object, absl::string_view key,
                                 absl::string_view where) {
  const Json* value = Find(object, key);
  if (value == nullptr || !value->is_object()) return WantError(value, key, "an object", where);
  return *value;
}

absl::StatusOr<std::optional<std::string>> OptionalStringField(const Json& object,
                                                               absl::string_view key,
                                                               absl::string_view where) {
  if (FindNonNull(object, key) == nullptr) return std::nullopt;
  KEEPSET_ASSIGN_OR_RETURN(std::string value, StringField(object, key, where));
  return std::optional<std::string>(std::move(value));
}

absl::StatusOr<std::optional<int64_t>> OptionalIntField(const Json& object, absl::string_view key,
                                                        int64_t low, int64_t high,
                                                        absl::string_view where) {
  if (FindNonNull(object, key) == nullptr) return std::nullopt;
  KEEPSET_ASSIGN_OR_RETURN(const int64_t value, IntField(object, key, low, high, where));
  return std::optional<int64_t>(value);
}

absl::StatusOr<std::optional<double>> OptionalFiniteField(const Json& object, absl::string_view key,
                                                          absl::string_view where) {
  if (FindNonNull(object, key) == nullptr) return std::nullopt;
  KEEPSET_ASSIGN_OR_RETURN(const double value, FiniteField(object, key, where));
  return std::optional<double>(value);
}

}  // namespace keepset::tables
