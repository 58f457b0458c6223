#include "service/rpc/requirements.h"

#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/input_needs.h"
#include "service/rpc/request_codec.h"
#include "tables/table_store.h"

namespace keepset::service {
namespace {

void EncodeTable(const tables::DecisionTable& table, v1::TableIdentity* identity) {
  identity->set_name(table.identity().name);
  identity->set_version(table.identity().version);
  identity->set_digest(table.identity().digest);
  identity->set_source(std::string(table.provenance_source()));
}

void EncodeNeeds(const engine::InputNeeds& needs, v1::GetRequirementsResponse& response) {
  for (const engine::LayerInputNeeds& layer : needs.layers) {
    v1::LayerRequirements* wire = response.add_layers();
    wire->set_layer(static_cast<uint32_t>(layer.layer));
    wire->set_queries(layer.queries);
    wire->set_keys(layer.keys);
    wire->set_values(layer.values);
    wire->set_column_stats(layer.columns);
    wire->mutable_qo_heads()->Add(layer.qo_heads.begin(), layer.qo_heads.end());
    wire->mutable_kv_heads()->Add(layer.kv_heads.begin(), layer.kv_heads.end());
  }
  response.set_ppl(needs.ppl);
  response.set_last_row(needs.last_row);
  response.set_observed_rows(needs.observed_rows);
  response.set_max_rows(static_cast<uint64_t>(needs.max_rows));
  response.set_probe_rows(needs.probe_rows);
  response.set_probe_name(needs.probe_name);
  response.set_probe_text(needs.probe_text);
}

}  // namespace

absl::Status DescribeRequirements(const ServiceContext& context,
                                  const v1::GetRequirementsRequest& request,
                                  v1::GetRequirementsResponse& response) {
  KEEPSET_ASSIGN_OR_RETURN(engine::OperationSpec spec,
                           DecodeQuestion(request.spec(), context.codec));
  KEEPSET_ASSIGN_OR_RETURN(const std::string kind, context.policies.TableKind(spec.policy));
  if (!kind.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(tables::TableQuery query,
                             DecodeTableQuery(request.spec(), spec, kind));
    // As an operation of the same session would pick it.
    if (query.name.empty() && !query.pins() && !request.spec().session_id().empty()) {
      const std::optional<v1::TablePin> pin = context.session_pins.Of(request.spec().session_id());
      if (pin.has_value()) ApplyPin(*pin, query);
    }
    KEEPSET_ASSIGN_OR_RETURN(const tables::ResolvedTable resolved,
                             tables::ResolveTable(*context.tables.Snapshot(), query));
    spec.table = resolved.table;
    EncodeTable(*spec.table, response.mutable_table());
  }
  KEEPSET_ASSIGN_OR_RETURN(const engine::InputNeeds needs,
                           engine::DescribeNeeds(spec, context.policies));
  EncodeNeeds(needs, response);
  return absl::OkStatus();
}

absl::Status DescribeTableRequirements(const engine::PolicyRegistry& policies,
                                       std::shared_ptr<const tables::DecisionTable> table,
                                       v1::GetRequirementsResponse& response) {
  engine::OperationSpec spec;
  for (const std::string& name : policies.Names()) {
    KEEPSET_ASSIGN_OR_RETURN(const std::string kind, policies.TableKind(name));
    if (kind == table->kind()) spec.policy = name;
  }
  if (spec.policy.empty()) {
    return absl::NotFoundError(absl::StrCat("table ", table->identity().name,
                                            ": no policy reads tables of kind ", table->kind()));
  }
  spec.model = table->model();
  spec.table = std::move(table);
  KEEPSET_ASSIGN_OR_RETURN(const engine::InputNeeds needs, engine::DescribeNeeds(spec, policies));
  EncodeTable(*spec.table, response.mutable_table());
  EncodeNeeds(needs, response);
  return absl::OkStatus();
}

}  // namespace keepset::service
