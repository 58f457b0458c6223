#include "clients/cpp/operation.h"

namespace keepset::client {

int64_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

absl::string_view ScopeName(Scope scope) {
  switch (scope) {
    case Scope::kNative:
      return "";
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

std::optional<Scope> ParseScope(absl::string_view name) {
  for (Scope scope : {Scope::kLayerElastic, Scope::kLayerEqual, Scope::kSequence, Scope::kKvHead}) {
    if (ScopeName(scope) == name) return scope;
  }
  return std::nullopt;
}

}  // namespace keepset::client
