// A policy whose scores a test writes down, so that what the operation adds can be checked exactly.
#ifndef KEEPSET_TESTS_FAKES_SCRIPTED_POLICY_H_
#define KEEPSET_TESTS_FAKES_SCRIPTED_POLICY_H_

#include <memory>
#include <string>
#include <vector>

#include "engine/policies/policy_registry.h"

namespace keepset::fakes {

struct Script {
  std::vector<std::vector<float>> scores;  // [L][score_rows * T]
  int64_t score_rows = 1;
  engine::ScoreKind score_kind = engine::ScoreKind::kRanking;
  engine::Locality locality = engine::Locality::kLayer;
  std::vector<float> taus;  // [L], threshold policies
  std::vector<kernels::SelectArgs::Range> forced;
  engine::Requirements needs;
  engine::Scope native_scope = engine::Scope::kLayerElastic;
  int64_t min_kept = 1;
  // Score of this layer fails once, the first time it is asked.
  int64_t failing_layer = -1;
};

// A registry with one policy, "scripted".
std::unique_ptr<engine::PolicyRegistry> NewScriptedRegistry(Script script);

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_SCRIPTED_POLICY_H_
