#include "service/server_observers.h"

#include <algorithm>
#include <optional>
#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/text.h"
#include "tables/table_file.h"

namespace keepset::service {
namespace {

// Others' text in our log.
constexpr size_t kMaxLoggedText = 128;
constexpr size_t kMaxLoggedError = 2048;

absl::string_view EndName(SessionEnd why) {
  switch (why) {
    case SessionEnd::kClosed:
      return "closed";
    case SessionEnd::kReplaced:
      return "replaced";
    case SessionEnd::kHangUp:
      return "hang_up";
    case SessionEnd::kLeaseExpired:
      return "lease_expired";
    case SessionEnd::kShutdown:
      return "shutdown";
  }
  return "unknown";
}

absl::string_view QuarantineEndName(QuarantineEnd until) {
  switch (until) {
    case QuarantineEnd::kNothing:
      return "operations_end";
    case QuarantineEnd::kProcess:
      return "process_end";
    case QuarantineEnd::kTime:
      return "quarantine_seconds";
  }
  return "unknown";
}

}  // namespace

// Session ids open the session's regions, so that they stay out of the log.
void ServerSessionObserver::OnSessionOpened(const OpenSessionArgs& args, const SessionInfo& info) {
  log_.Info("session_opened", {{"engine", ToText(args.engine, kMaxLoggedText)},
                               {"tenant", ToText(args.tenant, kMaxLoggedText)},
                               {"pid_hint", absl::StrCat(args.pid_hint)},
                               {"generation", absl::StrCat(info.generation)},
                               {"lease_s", absl::StrCat(absl::ToInt64Seconds(info.lease))}});
}

void ServerSessionObserver::OnSessionEnded(absl::string_view session_id, SessionEnd why,
                                           int64_t regions) {
  forget_(session_id);
  metrics_.RecordSessionEnd(EndName(why));
  log_.Info("session_ended",
            {{"why", std::string(EndName(why))}, {"regions", absl::StrCat(regions)}});
}

void ServerSessionObserver::OnRegionRegistered(absl::string_view /*session_id*/,
                                               const RegionInfo& region) {
  log_.Info(region.owned_bytes > 0 ? "region_allocated" : "region_registered",
            {{"kind", region.kind}, {"bytes", absl::StrCat(region.length)}});
}

void ServerSessionObserver::OnRegionRefused(absl::string_view kind, const absl::Status& why) {
  metrics_.RecordImportFailure(kind);
  log_.Warning("region_refused",
               {{"kind", std::string(kind)}, {"error", ToText(why.message(), kMaxLoggedError)}});
}

void ServerSessionObserver::OnRegionQuarantined(const RegionInfo& region, QuarantineEnd until) {
  log_.Info("region_quarantined", {{"kind", region.kind},
                                   {"bytes", absl::StrCat(region.owned_bytes)},
                                   {"until", std::string(QuarantineEndName(until))}});
}

TableInfoSample TableSampleOf(const tables::DecisionTable& table) {
  TableInfoSample sample;
  sample.model = table.model().architecture;
  sample.name = table.identity().name;
  sample.version = table.identity().version;
  sample.digest = table.identity().digest;
  sample.created = std::max(table.created(), absl::UnixEpoch());
  if (const tables::CompilerKvTable* grid = table.AsCompilerKv()) {
    sample.num_entropy_bins = static_cast<int64_t>(grid->entropy_edges().size()) + 1;
    sample.num_ppl_bins = static_cast<int64_t>(grid->ppl_edges().size()) + 1;
  }
  return sample;
}

void ServerTableObserver::LogActivation(const RegistryView* before, const LineView& line) {
  const std::optional<TableTarget>& active = line.assignment.active;
  if (before != nullptr) {
    const auto old = before->lines.find(line.name);
    if (old != before->lines.end() && old->second->assignment.active == active) return;
  }
  if (!active.has_value()) {
    log_.Info("table_inactive", {{"name", line.name}, {"revision", absl::StrCat(line.revision)}});
    return;
  }
  const std::vector<Activation>& history = line.assignment.history;
  log_.Info("table_active", {{"name", line.name},
                             {"version", active->version},
                             {"digest", active->digest},
                             {"cause", history.empty() ? "" : history.back().cause},
                             {"revision", absl::StrCat(line.revision)}});
}

void ServerTableObserver::OnChanged(const RegistryView* before, const RegistryView& after,
                                    const tables::TableSnapshot& snapshot) {
  std::vector<TableInfoSample> samples;
  std::set<std::string> models;
  for (const auto& table : snapshot.tables) {
    samples.push_back(TableSampleOf(*table));
    models.insert(table->model().architecture);
  }
  bool lines_changed = before == nullptr || before->lines.size() != after.lines.size();
  for (const auto& [name, line] : after.lines) {
    if (before != nullptr) {
      const auto old = before->lines.find(name);
      if (old != before->lines.end() && old->second == line) continue;
    }
    lines_changed = true;
    LogActivation(before, *line);
  }
  if (before != nullptr) {
    for (const auto& [name, line] : before->lines) {
      if (after.lines.contains(name) || !line->assignment.active.has_value()) continue;
      log_.Info("table_inactive",
                {{"name", name}, {"revision", absl::StrCat(ShownRevision(after))}});
    }
  }
  metrics_.SetTables(samples, clock_.Now());
  if (lines_changed) metrics_.RecordReload(Metrics::Reload::kSuccess);
  health_.SetModels(std::move(models));
}

void ServerTableObserver::OnSynced(absl::string_view source) {
  metrics_.RecordSourceSync(source, clock_.Now());
}

void ServerTableObserver::OnRefused(absl::string_view source, absl::string_view origin,
                                    const absl::Status& why) {
  metrics_.RecordReload(Metrics::Reload::kRefused);
  log_.Error("table_refused", {{"source", std::string(source)},
                               {"file", std::string(origin)},
                               {"error", ToText(why.message(), kMaxLoggedError)}});
}

void ServerTableObserver::OnSourceHealth(absl::string_view source, const absl::Status& health) {
  if (health.ok()) {
    log_.Info("table_source_ok", {{"source", std::string(source)}});
    return;
  }
  if (source != kStateSource) {
    metrics_.RecordReload(Metrics::Reload::kRefused);
    metrics_.RecordSourceFailure(source);
  }
  log_.Error("table_source_failed", {{"source", std::string(source)},
                                     {"error", ToText(health.message(), kMaxLoggedError)}});
}

}  // namespace keepset::service
