#include "service/rpc/table_findings.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "service/rpc/table_codec.h"

namespace keepset::service {
namespace {

class Findings {
 public:
  explicit Findings(v1::ValidateTableResponse* response) : response_(response) {
    response_->set_valid(true);
  }
  void Error(absl::string_view message) {
    response_->set_valid(false);
    Add(v1::TableFinding::SEVERITY_ERROR, message);
  }
  void Warning(absl::string_view message) { Add(v1::TableFinding::SEVERITY_WARNING, message); }
  void Note(absl::string_view message) { Add(v1::TableFinding::SEVERITY_NOTE, message); }

 private:
  void Add(v1::TableFinding::Severity severity, absl::string_view message) {
    v1::TableFinding* finding = response_->add_findings();
    finding->set_severity(severity);
    finding->set_message(ToText(message));
  }
  v1::ValidateTableResponse* const response_;
};

void CompareWithActive(const tables::DecisionTable& table, const LineView& line,
                       Findings& findings) {
  for (const TableVersionInfo& version : line.versions) {
    if (version.state != VersionState::kActive) continue;
    if (version.table->kind() != table.kind()) {
      findings.Warning(absl::StrCat("kind=", table.kind(), ", the active version ", version.version,
                                    " is ", version.table->kind()));
    }
    const absl::Status fit =
        tables::MatchFingerprint(table.model(), version.table->model(),
                                 tables::FingerprintMatch::kFull, tables::LayerMatch::kExact);
    if (!fit.ok()) {
      findings.Warning(absl::StrCat("is of another model than the active version ", version.version,
                                    ": ", fit.message()));
    }
  }
}

void CompareWithLine(const tables::DecisionTable& table, const LineView& line, Findings& findings) {
  const tables::TableIdentity& identity = table.identity();
  for (const TableVersionInfo& version : line.versions) {
    const bool loaded =
        version.state == VersionState::kActive || version.state == VersionState::kReady;
    if (!loaded || version.version != identity.version) continue;
    if (version.digest == identity.digest) {
      findings.Note(absl::StrCat("is loaded already, ", VersionStateName(version.state)));
    } else {
      findings.Error(absl::StrCat("table ", identity.name, "@", identity.version,
                                  " is loaded with other content (", version.digest,
                                  "), want another version"));
    }
  }
  CompareWithActive(table, line, findings);
}

void LookAtTable(const tables::DecisionTable& table, const RegistryView& view, Findings& findings) {
  const auto line = view.lines.find(table.identity().name);
  if (line != view.lines.end()) CompareWithLine(table, *line->second, findings);
  for (const std::string& ignored : table.ignored()) {
    findings.Warning(absl::StrCat("ignored: ", ignored));
  }
  if (table.created() == absl::InfinitePast()) {
    findings.Note(
        "provenance.created is not stated as an RFC 3339 time: the order of versions goes by their "
        "names");
  }
}

}  // namespace

absl::Status FindFindings(const v1::ValidateTableRequest& request, const TableRegistry& registry,
                          TableLoader& validator, v1::ValidateTableResponse* response) {
  Findings findings(response);
  if (request.subject_case() == v1::ValidateTableRequest::kLoaded) {
    KEEPSET_ASSIGN_OR_RETURN(const TableVersionInfo version,
                             registry.Find(DecodeTableRef(request.loaded())));
    EncodeVersion(version, response->mutable_version());
    LookAtTable(*version.table, *registry.View(), findings);
    return absl::OkStatus();
  }
  if (request.subject_case() != v1::ValidateTableRequest::kContent) {
    return absl::InvalidArgumentError("subject: want content or loaded");
  }
  const absl::StatusOr<TablePtr> table =
      validator.LoadTable({request.content(), "content", request.signature()});
  if (!table.ok()) {
    findings.Error(table.status().message());
    return absl::OkStatus();
  }
  TableVersionInfo version;
  version.name = (*table)->identity().name;
  version.version = (*table)->identity().version;
  version.digest = (*table)->identity().digest;
  version.state = VersionState::kValidating;
  version.loaded = version.state_since = absl::InfinitePast();
  version.table = *table;
  EncodeVersion(version, response->mutable_version());
  LookAtTable(**table, *registry.View(), findings);
  return absl::OkStatus();
}

}  // namespace keepset::service
