#include "clients/cpp/table_codec.h"

namespace keepset::client {
namespace {

absl::Time Milliseconds(int64_t unix_ms) {
  return unix_ms == 0 ? absl::InfinitePast() : absl::FromUnixMillis(unix_ms);
}

TableState DecodeState(v1::TableState state) {
  switch (state) {
    case v1::TABLE_STATE_VALIDATING:
      return TableState::kValidating;
    case v1::TABLE_STATE_ACTIVE:
      return TableState::kActive;
    case v1::TABLE_STATE_RETIRED:
      return TableState::kRetired;
    case v1::TABLE_STATE_FAILED:
      return TableState::kFailed;
    default:
      return TableState::kReady;
  }
}

ModelFingerprint DecodeModel(const v1::ModelFingerprint& model) {
  return {model.architecture(), model.num_layers(), model.num_qo_heads(), model.num_kv_heads(),
          model.head_dim(),     model.rope_json(),  model.revision()};
}

TableFinding::Severity DecodeSeverity(v1::TableFinding::Severity severity) {
  switch (severity) {
    case v1::TableFinding::SEVERITY_ERROR:
      return TableFinding::Severity::kError;
    case v1::TableFinding::SEVERITY_WARNING:
      return TableFinding::Severity::kWarning;
    default:
      return TableFinding::Severity::kNote;
  }
}

template <typename Out, typename Messages, typename Decode>
std::vector<Out> DecodeAll(const Messages& messages, Decode decode) {
  std::vector<Out> out;
  out.reserve(messages.size());
  for (const auto& message : messages) out.push_back(decode(message));
  return out;
}

TableSource DecodeSource(const v1::TableSourceState& source) {
  return {source.source(), source.healthy(), source.detail(), Milliseconds(source.since_ms())};
}

}  // namespace

void EncodeRef(const TableRef& table, v1::TableRef* out) {
  out->set_name(table.name);
  out->set_version(table.version);
  out->set_digest(table.digest);
  out->set_alias(table.alias);
}

TableVersion DecodeVersion(const v1::TableVersion& version) {
  return {.name = version.name(),
          .version = version.version(),
          .digest = version.digest(),
          .kind = version.kind(),
          .provenance = version.provenance(),
          .created = Milliseconds(version.created_ms()),
          .model = DecodeModel(version.model()),
          .state = DecodeState(version.state()),
          .reason = version.reason(),
          .sources = {version.sources().begin(), version.sources().end()},
          .origin = version.origin(),
          .loaded = Milliseconds(version.loaded_ms()),
          .state_since = Milliseconds(version.state_since_ms()),
          .durable = version.durable(),
          .bytes = version.bytes()};
}

TableLine DecodeLine(const v1::TableLine& line) {
  TableLine out;
  out.name = line.name();
  out.revision = line.revision();
  out.follows_newest = line.mode() == v1::TABLE_LINE_MODE_NEWEST;
  out.active_version = line.active_version();
  out.active_digest = line.active_digest();
  if (line.has_canary()) {
    const v1::TableCanary& canary = line.canary();
    out.canary = {canary.version(), canary.digest(), canary.percent(), canary.salt()};
  }
  out.aliases = DecodeAll<TableAlias>(line.aliases(), [](const v1::TableAlias& alias) {
    return TableAlias{alias.alias(), alias.version(), alias.digest()};
  });
  out.history = DecodeAll<TableActivation>(line.history(), [](const v1::TableActivation& one) {
    return TableActivation{one.version(), one.digest(), Milliseconds(one.time_ms()),
                           one.actor(),   one.cause(),  one.undone()};
  });
  out.versions = DecodeAll<TableVersion>(line.versions(), DecodeVersion);
  return out;
}

TableList DecodeList(const v1::ListTablesResponse& response) {
  return {.revision = response.revision(),
          .lines = DecodeAll<TableLine>(response.lines(), DecodeLine),
          .nameless = DecodeAll<TableVersion>(response.nameless(), DecodeVersion),
          .sources = DecodeAll<TableSource>(response.sources(), DecodeSource),
          .writable = response.writable(),
          .authority = response.authority()};
}

TableValidation DecodeValidation(const v1::ValidateTableResponse& response) {
  TableValidation out;
  out.valid = response.valid();
  out.findings = DecodeAll<TableFinding>(response.findings(), [](const v1::TableFinding& finding) {
    return TableFinding{DecodeSeverity(finding.severity()), finding.message()};
  });
  if (response.has_version()) out.version = DecodeVersion(response.version());
  return out;
}

TableUploadResult DecodeUpload(const v1::LoadTableResponse& response) {
  return {DecodeVersion(response.version()), response.revision(), response.durable(),
          response.already_loaded()};
}

TableWriteResult DecodeWrite(const v1::TableWriteResponse& response) {
  return {response.revision(), DecodeLine(response.line()), response.previous_version(),
          response.durable()};
}

TableChange DecodeChange(const v1::WatchTablesResponse& response) {
  return {.revision = response.revision(),
          .complete = response.complete(),
          .lines = DecodeAll<TableLine>(response.lines(), DecodeLine),
          .removed = {response.removed().begin(), response.removed().end()},
          .sources = DecodeAll<TableSource>(response.sources(), DecodeSource)};
}

}  // namespace keepset::client
