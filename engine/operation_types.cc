#include "engine/operation_types.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace keepset::engine {

absl::string_view ScopeName(Scope scope) {
  switch (scope) {
    case Scope::kLayerElastic:
      return "layer_elastic";
    case Scope::kLayerEqual:
      return "layer_equal";
    case Scope::kSequence:
      return "sequence";
    case Scope::kKvHead:
      return "kv_head";
  }
  return "";
}

absl::string_view OutcomeName(Outcome outcome) {
  switch (outcome) {
    case Outcome::kCompressed:
      return "compressed";
    case Outcome::kKeptFull:
      return "kept_full";
    case Outcome::kShadow:
      return "shadow";
  }
  return "";
}

absl::string_view ReasonName(Reason reason) {
  switch (reason) {
    case Reason::kNone:
      return "none";
    case Reason::kBelowBudget:
      return "below_budget";
    case Reason::kNoSaving:
      return "no_saving";
    case Reason::kShed:
      return "shed";
    case Reason::kDeadline:
      return "deadline";
    case Reason::kDeviceFault:
      return "device_fault";
  }
  return "";
}

absl::string_view DefaultedInputName(DefaultedInput input) {
  switch (input) {
    case DefaultedInput::kPpl:
      return "ppl";
  }
  return "";
}

absl::StatusOr<Scope> ParseScope(absl::string_view name) {
  for (const Scope scope :
       {Scope::kLayerElastic, Scope::kLayerEqual, Scope::kSequence, Scope::kKvHead}) {
    if (name == ScopeName(scope)) return scope;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("scope '", name, "', want layer_elastic, layer_equal, sequence or kv_head"));
}

}  // namespace keepset::engine
