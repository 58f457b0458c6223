#include "tests/fakes/scripted_policy.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace keepset::fakes {
namespace {

class ScriptedPolicy final : public engine::LayerwisePolicy {
 public:
  explicit ScriptedPolicy(Script script) : script_(std::move(script)) {}

  engine::Requirements requirements() const override { return script_.needs; }
  engine::ScoreKind score_kind() const override { return script_.score_kind; }
  engine::Locality locality() const override { return script_.locality; }
  int64_t score_rows(const engine::PolicyContext& /*context*/) const override {
    return script_.score_rows;
  }
  absl::Status Begin(engine::PolicyContext& /*context*/) override { return absl::OkStatus(); }

  absl::Status ScoreLayer(engine::PolicyContext& context, int64_t layer,
                          const engine::LayerObservation& /*observation*/,
                          kernels::ScoreBuffer& scores) override {
    if (layer == script_.failing_layer) {
      script_.failing_layer = -1;
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": scripted failure"));
    }
    return context.backend.CopyFromHost(context.op_context, script_.scores[layer], scores);
  }

  engine::LayerVerdict Verdict(int64_t layer) const override {
    engine::LayerVerdict verdict;
    if (!script_.taus.empty()) verdict.tau = script_.taus[layer];
    return verdict;
  }
  std::vector<kernels::SelectArgs::Range> ForcedRanges(
      const engine::PolicyContext& /*context*/) const override {
    return script_.forced;
  }
  int64_t min_kept() const override { return script_.min_kept; }

 private:
  Script script_;
};

class ScriptedRegistry final : public engine::PolicyRegistry {
 public:
  explicit ScriptedRegistry(Script script) : script_(std::move(script)) {}

  std::vector<std::string> Names() const override { return {"scripted"}; }
  absl::StatusOr<engine::Scope> NativeScope(absl::string_view /*name*/) const override {
    return script_.native_scope;
  }
  absl::StatusOr<std::string> TableKind(absl::string_view /*name*/) const override {
    return std::string(script_.needs.table_kind);
  }
  absl::StatusOr<std::unique_ptr<engine::RetentionPolicy>> New(
      absl::string_view /*name*/, engine::PolicyParameters& /*parameters*/) const override {
    return std::make_unique<ScriptedPolicy>(script_);
  }

 private:
  const Script script_;
};

}  // namespace

std::unique_ptr<engine::PolicyRegistry> NewScriptedRegistry(Script script) {
  return std::make_unique<ScriptedRegistry>(std::move(script));
}

}  // namespace keepset::fakes
