// Parameters of a policy as text, read by type; whatever nobody read is unknown and refused.
#ifndef KEEPSET_ENGINE_POLICIES_POLICY_PARAMETERS_H_
#define KEEPSET_ENGINE_POLICIES_POLICY_PARAMETERS_H_

#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace keepset::engine {

class PolicyParameters {
 public:
  PolicyParameters(std::string policy, std::map<std::string, std::string> values)
      : policy_(std::move(policy)), values_(std::move(values)) {}

  // The parameter or its default. InvalidArgument: not an integer, or outside [min, max].
  absl::StatusOr<int64_t> Int(absl::string_view name, int64_t default_value, int64_t min,
                              int64_t max);
  // The parameter, if it is given. InvalidArgument: not a number, or outside [min, max].
  absl::StatusOr<std::optional<double>> OptionalNumber(absl::string_view name, double min,
                                                       double max);
  // The parameter as it is given, if it is.
  std::optional<std::string> OptionalText(absl::string_view name);
  // The parameter or the first of `choices`. InvalidArgument lists the choices.
  absl::StatusOr<std::string> Choice(absl::string_view name,
                                     std::initializer_list<absl::string_view> choices);

  // Call after the last read: InvalidArgument when a given parameter was never asked for, naming it
  // and the known ones.
  absl::Status RefuseUnknown() const;

 private:
  std::string policy_;
  std::map<std::string, std::string> values_;
  std::set<std::string> known_;
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_POLICY_PARAMETERS_H_
