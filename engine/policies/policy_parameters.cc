#include "engine/policies/policy_parameters.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::engine {

absl::StatusOr<int64_t> PolicyParameters::Int(absl::string_view name, int64_t default_value,
                                              int64_t min, int64_t max) {
  known_.emplace(name);
  const auto it = values_.find(std::string(name));
  if (it == values_.end()) return default_value;
  int64_t value = 0;
  if (!absl::SimpleAtoi(it->second, &value) || value < min || value > max) {
    return absl::InvalidArgumentError(absl::StrCat("policy ", policy_, ": parameter ", name, "=",
                                                   it->second, ", want an integer in ", min, "..",
                                                   max));
  }
  return value;
}

absl::StatusOr<std::optional<double>> PolicyParameters::OptionalNumber(absl::string_view name,
                                                                       double min, double max) {
  const std::optional<std::string> text = OptionalText(name);
  if (!text.has_value()) return std::nullopt;
  double value = 0.0;
  if (!absl::SimpleAtod(*text, &value) || !(value >= min && value <= max)) {
    return absl::InvalidArgumentError(absl::StrCat("policy ", policy_, ": parameter ", name, "=",
                                                   *text, ", want a number in ", min, "..", max));
  }
  return value;
}

std::optional<std::string> PolicyParameters::OptionalText(absl::string_view name) {
  known_.emplace(name);
  const auto it = values_.find(std::string(name));
  if (it == values_.end()) return std::nullopt;
  return it->second;
}

absl::StatusOr<std::string> PolicyParameters::Choice(
    absl::string_view name, std::initializer_list<absl::string_view> choices) {
  known_.emplace(name);
  const auto it = values_.find(std::string(name));
  if (it == values_.end()) return std::string(*choices.begin());
  for (const absl::string_view choice : choices) {
    if (it->second == choice) return it->second;
  }
  return absl::InvalidArgumentError(absl::StrCat("policy ", policy_, ": parameter ", name, "=",
                                                 it->second, ", want one of ",
                                                 absl::StrJoin(choices, ", ")));
}

absl::Status PolicyParameters::RefuseUnknown() const {
  for (const auto& [name, value] : values_) {
    if (known_.contains(name)) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "policy ", policy_, ": unknown parameter ", name, "=", value, ", ",
        known_.empty() ? "want none" : absl::StrCat("known are ", absl::StrJoin(known_, ", "))));
  }
  return absl::OkStatus();
}

}  // namespace keepset::engine
