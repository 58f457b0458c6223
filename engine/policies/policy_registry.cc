#include "engine/policies/policy_registry.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::engine {

#define KEEPSET_POLICY(name, factory, native_scope, table_kind) \
  absl::StatusOr<std::unique_ptr<RetentionPolicy>> factory(PolicyParameters& parameters);
#include "engine/policies/policies.def"
#undef KEEPSET_POLICY

namespace {

struct Entry {
  absl::string_view name;
  absl::StatusOr<std::unique_ptr<RetentionPolicy>> (*create)(PolicyParameters& parameters);
  Scope native_scope;
  absl::string_view table_kind;
};

constexpr Entry kEntries[] = {
#define KEEPSET_POLICY(name, factory, native_scope, table_kind) \
  {#name, &factory, native_scope, table_kind},
#include "engine/policies/policies.def"
#undef KEEPSET_POLICY
};

constexpr bool NamesAreDistinct() {
  for (const Entry& a : kEntries) {
    for (const Entry& b : kEntries) {
      if (&a != &b && a.name == b.name) return false;
    }
  }
  return true;
}
static_assert(NamesAreDistinct(), "policies.def lists a policy twice");

absl::StatusOr<const Entry*> Find(absl::string_view name) {
  for (const Entry& entry : kEntries) {
    if (entry.name == name) return &entry;
  }
  return absl::NotFoundError(absl::StrCat(
      "unknown policy '", name, "', known are ",
      absl::StrJoin(kEntries, ", ",
                    [](std::string* out, const Entry& e) { absl::StrAppend(out, e.name); })));
}

class BuiltinPolicyRegistry final : public PolicyRegistry {
 public:
  std::vector<std::string> Names() const override {
    std::vector<std::string> names;
    for (const Entry& entry : kEntries) names.emplace_back(entry.name);
    return names;
  }

  absl::StatusOr<Scope> NativeScope(absl::string_view name) const override {
    const absl::StatusOr<const Entry*> entry = Find(name);
    if (!entry.ok()) return entry.status();
    return (*entry)->native_scope;
  }

  absl::StatusOr<std::string> TableKind(absl::string_view name) const override {
    const absl::StatusOr<const Entry*> entry = Find(name);
    if (!entry.ok()) return entry.status();
    return std::string((*entry)->table_kind);
  }

  absl::StatusOr<std::unique_ptr<RetentionPolicy>> New(
      absl::string_view name, PolicyParameters& parameters) const override {
    const absl::StatusOr<const Entry*> entry = Find(name);
    if (!entry.ok()) return entry.status();
    return (*entry)->create(parameters);
  }
};

}  // namespace

std::unique_ptr<PolicyRegistry> NewBuiltinPolicyRegistry() {
  return std::make_unique<BuiltinPolicyRegistry>();
}

}  // namespace keepset::engine
