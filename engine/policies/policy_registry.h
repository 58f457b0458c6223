// The retention policies of this build, listed in policies.def.
#ifndef KEEPSET_ENGINE_POLICIES_POLICY_REGISTRY_H_
#define KEEPSET_ENGINE_POLICIES_POLICY_REGISTRY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_parameters.h"
#include "engine/policies/retention_policy.h"

namespace keepset::engine {

// Resolves policy names. Thread-safe: immutable after construction.
class PolicyRegistry {
 public:
  virtual ~PolicyRegistry() = default;

  virtual std::vector<std::string> Names() const = 0;
  // NotFound lists the known policies.
  virtual absl::StatusOr<Scope> NativeScope(absl::string_view name) const = 0;
  // Kind of table the policy reads; empty for policies without one. NotFound as above.
  virtual absl::StatusOr<std::string> TableKind(absl::string_view name) const = 0;
  // A policy for one operation. Reads its own parameters; the shared ones (dilate, head_merge,
  // layer_merge, equal_count) are the operation's, which then refuses what nobody read.
  virtual absl::StatusOr<std::unique_ptr<RetentionPolicy>> New(
      absl::string_view name, PolicyParameters& parameters) const = 0;
};

// Every policy of policies.def.
std::unique_ptr<PolicyRegistry> NewBuiltinPolicyRegistry();

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_POLICY_REGISTRY_H_
