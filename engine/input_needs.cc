#include "engine/input_needs.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/json_text.h"

namespace keepset::engine {
namespace {

absl::string_view Text(bool value) { return value ? "true" : "false"; }

std::string LayerJson(const LayerInputNeeds& layer) {
  return absl::StrCat("{\"layer\": ", layer.layer, ", \"queries\": ", Text(layer.queries),
                      ", \"keys\": ", Text(layer.keys), ", \"values\": ", Text(layer.values),
                      ", \"columns\": ", Text(layer.columns), ", \"qo_heads\": [",
                      absl::StrJoin(layer.qo_heads, ", "), "], \"kv_heads\": [",
                      absl::StrJoin(layer.kv_heads, ", "), "]}");
}

}  // namespace

absl::StatusOr<InputNeeds> DescribeNeeds(const OperationSpec& spec,
                                         const PolicyRegistry& policies) {
  PolicyParameters parameters(spec.policy, spec.parameters);
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<RetentionPolicy> policy,
                           policies.New(spec.policy, parameters));
  return policy->Needs(spec);
}

std::string InputNeedsJson(const InputNeeds& needs) {
  std::vector<std::string> rows;
  if (needs.last_row) rows.emplace_back("\"last_row\"");
  if (needs.observed_rows) rows.emplace_back("\"observed_rows\"");
  if (needs.probe_rows) rows.emplace_back("\"probe_rows\"");
  const std::string probe =
      needs.probe_rows ? absl::StrCat("{\"name\": ", tables::JsonQuoted(needs.probe_name),
                                      ", \"text\": ", tables::JsonQuoted(needs.probe_text), "}")
                       : "null";
  return absl::StrCat("{\"layers\": [",
                      absl::StrJoin(needs.layers, ", ",
                                    [](std::string* out, const LayerInputNeeds& layer) {
                                      absl::StrAppend(out, LayerJson(layer));
                                    }),
                      "], \"rows\": [", absl::StrJoin(rows, ", "),
                      "], \"max_rows\": ", needs.max_rows, ", \"ppl\": ", Text(needs.ppl),
                      ", \"probe\": ", probe, "}");
}

}  // namespace keepset::engine
