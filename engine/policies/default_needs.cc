#include "engine/policies/retention_policy.h"

namespace keepset::engine {

absl::StatusOr<InputNeeds> RetentionPolicy::Needs(const OperationSpec& spec) const {
  const Requirements needs = requirements();
  InputNeeds inputs;
  inputs.ppl = needs.ppl;
  inputs.observed_rows = needs.observation;
  inputs.max_rows = needs.max_rows;
  if (!needs.observation && !needs.keys && !needs.values) return inputs;
  for (int64_t layer = 0; layer < spec.model.num_layers; ++layer) {
    LayerInputNeeds one;
    one.layer = layer;
    one.queries = needs.observation;
    one.keys = needs.observation || needs.keys;
    one.values = needs.values;
    one.columns = needs.columns;
    inputs.layers.push_back(std::move(one));
  }
  return inputs;
}

}  // namespace keepset::engine
