#include "service/server_observers.h"

#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tables/table_file.h"

namespace keepset::service {
namespace {

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

}  // namespace

// Session ids open the session's regions, so that they stay out of the log.
void ServerSessionObserver::OnSessionOpened(const OpenSessionArgs& args, const SessionInfo& info) {
  log_.Info("session_opened", {{"engine", args.engine.substr(0, 128)},
                               {"tenant", args.tenant.substr(0, 128)},
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
  log_.Info("region_registered", {{"kind", region.kind}, {"bytes", absl::StrCat(region.length)}});
}

void ServerSessionObserver::OnRegionRefused(absl::string_view kind, const absl::Status& why) {
  metrics_.RecordImportFailure(kind);
  log_.Warning("region_refused",
               {{"kind", std::string(kind)}, {"error", std::string(why.message())}});
}

TableInfoSample TableSampleOf(const tables::DecisionTable& table) {
  TableInfoSample sample;
  sample.model = table.model().architecture;
  sample.name = table.identity().name;
  sample.version = table.identity().version;
  sample.digest = table.identity().digest;
  sample.created = tables::TableCreated(table).value_or(absl::UnixEpoch());
  if (const tables::CompilerKvTable* grid = table.AsCompilerKv()) {
    sample.num_entropy_bins = static_cast<int64_t>(grid->entropy_edges().size()) + 1;
    sample.num_ppl_bins = static_cast<int64_t>(grid->ppl_edges().size()) + 1;
  }
  return sample;
}

void ServerTableObserver::OnPublished(const tables::TableSnapshot& snapshot) {
  std::vector<TableInfoSample> samples;
  std::set<std::string> models;
  for (const auto& table : snapshot.tables) {
    const tables::TableIdentity& identity = table->identity();
    samples.push_back(TableSampleOf(*table));
    models.insert(table->model().architecture);
    log_.Info("table_active", {{"name", identity.name},
                               {"version", identity.version},
                               {"digest", identity.digest},
                               {"revision", absl::StrCat(snapshot.revision)}});
  }
  metrics_.SetTables(samples, clock_.Now());
  metrics_.RecordReload(Metrics::Reload::kSuccess);
  metrics_.RecordSourceSync("directory", clock_.Now());
  health_.SetModels(std::move(models));
}

void ServerTableObserver::OnRefused(absl::string_view file, const absl::Status& why) {
  metrics_.RecordReload(Metrics::Reload::kRefused);
  log_.Error("table_refused", {{"file", std::string(file)}, {"error", std::string(why.message())}});
}

}  // namespace keepset::service
