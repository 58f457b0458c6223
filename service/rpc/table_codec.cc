#include "service/rpc/table_codec.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/text.h"

namespace keepset::service {
namespace {

constexpr double kStepsPerPercent = 100;

int64_t Millis(absl::Time time) {
  return time == absl::InfinitePast() ? 0 : absl::ToUnixMillis(time);
}

v1::TableState EncodeState(VersionState state) {
  switch (state) {
    case VersionState::kValidating:
      return v1::TABLE_STATE_VALIDATING;
    case VersionState::kReady:
      return v1::TABLE_STATE_READY;
    case VersionState::kActive:
      return v1::TABLE_STATE_ACTIVE;
    case VersionState::kRetired:
      return v1::TABLE_STATE_RETIRED;
    case VersionState::kFailed:
      return v1::TABLE_STATE_FAILED;
  }
  return v1::TABLE_STATE_UNSPECIFIED;
}

void EncodeModel(const tables::ModelFingerprint& model, v1::ModelFingerprint* wire) {
  wire->set_architecture(model.architecture);
  wire->set_num_layers(static_cast<uint32_t>(model.num_layers));
  wire->set_num_qo_heads(static_cast<uint32_t>(model.num_qo_heads));
  wire->set_num_kv_heads(static_cast<uint32_t>(model.num_kv_heads));
  wire->set_head_dim(static_cast<uint32_t>(model.head_dim));
  wire->set_rope_json(model.rope_json);
  wire->set_revision(model.revision);
}

}  // namespace

TableRef DecodeTableRef(const v1::TableRef& wire) {
  TableRef ref;
  ref.name = wire.name();
  ref.version = wire.version();
  ref.digest = wire.digest();
  ref.alias = wire.alias();
  return ref;
}

absl::StatusOr<int> DecodePercent(double percent) {
  const double steps = std::round(percent * kStepsPerPercent);
  if (!(percent >= 0 && percent <= 100) || (percent > 0 && steps < 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("percent=", percent, ", want 0, or 0.01..100 in steps of 0.01"));
  }
  return static_cast<int>(steps);
}

void EncodeVersion(const TableVersionInfo& version, v1::TableVersion* wire) {
  wire->set_name(version.name);
  wire->set_version(version.version);
  wire->set_digest(version.digest);
  wire->set_state(EncodeState(version.state));
  wire->set_reason(ToText(version.reason));
  for (const std::string& source : version.sources) wire->add_sources(source);
  wire->set_origin(ToText(version.origin));
  wire->set_loaded_ms(Millis(version.loaded));
  wire->set_state_since_ms(Millis(version.state_since));
  wire->set_durable(version.durable);
  if (version.table == nullptr) return;
  wire->set_kind(std::string(version.table->kind()));
  wire->set_provenance(std::string(version.table->provenance_source()));
  wire->set_created_ms(Millis(version.table->created()));
  wire->set_bytes(version.table->file_bytes().size());
  EncodeModel(version.table->model(), wire->mutable_model());
}

void EncodeLine(const LineView& line, v1::TableLine* wire) {
  const LineAssignment& assignment = line.assignment;
  wire->set_name(line.name);
  wire->set_revision(line.revision);
  wire->set_mode(assignment.mode == LineMode::kChosen ? v1::TABLE_LINE_MODE_CHOSEN
                                                      : v1::TABLE_LINE_MODE_NEWEST);
  if (assignment.active.has_value()) {
    wire->set_active_version(assignment.active->version);
    wire->set_active_digest(assignment.active->digest);
  }
  if (assignment.canary.has_value()) {
    v1::TableCanary* canary = wire->mutable_canary();
    canary->set_version(assignment.canary->target.version);
    canary->set_digest(assignment.canary->target.digest);
    canary->set_percent(assignment.canary->basis_points / kStepsPerPercent);
    canary->set_salt(assignment.canary->salt);
  }
  for (const auto& [name, target] : assignment.aliases) {
    v1::TableAlias* alias = wire->add_aliases();
    alias->set_alias(name);
    alias->set_version(target.version);
    alias->set_digest(target.digest);
  }
  for (const Activation& entry : assignment.history) {
    v1::TableActivation* activation = wire->add_history();
    activation->set_version(entry.target.version);
    activation->set_digest(entry.target.digest);
    activation->set_time_ms(Millis(entry.time));
    activation->set_actor(ToText(entry.actor));
    activation->set_cause(entry.cause);
    activation->set_undone(entry.undone);
  }
  for (const TableVersionInfo& version : line.versions) {
    EncodeVersion(version, wire->add_versions());
  }
}

void EncodeSource(const SourceView& source, v1::TableSourceState* wire) {
  wire->set_source(source.source);
  wire->set_healthy(source.health.ok());
  wire->set_detail(ToText(source.health.message()));
  wire->set_since_ms(Millis(source.since));
}

}  // namespace keepset::service
