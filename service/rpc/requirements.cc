#include "service/rpc/requirements.h"

#include <optional>
#include <string>

#include "base/status_macros.h"
#include "engine/input_needs.h"
#include "service/rpc/request_codec.h"
#include "tables/table_store.h"

namespace keepset::service {

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
    v1::TableIdentity* identity = response.mutable_table();
    identity->set_name(spec.table->identity().name);
    identity->set_version(spec.table->identity().version);
    identity->set_digest(spec.table->identity().digest);
    identity->set_source(std::string(spec.table->provenance_source()));
  }
  KEEPSET_ASSIGN_OR_RETURN(const engine::InputNeeds needs,
                           engine::DescribeNeeds(spec, context.policies));
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
  return absl::OkStatus();
}

}  // namespace keepset::service
