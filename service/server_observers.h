// What sessions and tables tell metrics, log and health. Thread-safe.
#ifndef KEEPSET_SERVICE_SERVER_OBSERVERS_H_
#define KEEPSET_SERVICE_SERVER_OBSERVERS_H_

#include <functional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/log.h"
#include "service/health_board.h"
#include "service/memory/session_manager.h"
#include "service/metrics/metrics.h"
#include "service/registry/table_registry.h"

namespace keepset::service {

class ServerSessionObserver final : public SessionObserver {
 public:
  // `forget` is called with the id of every session that ended.
  ServerSessionObserver(Metrics& metrics, Logger& log,
                        std::function<void(absl::string_view)> forget)
      : metrics_(metrics), log_(log), forget_(std::move(forget)) {}

  void OnSessionOpened(const OpenSessionArgs& args, const SessionInfo& info) override;
  void OnSessionEnded(absl::string_view session_id, SessionEnd why, int64_t regions) override;
  void OnRegionRegistered(absl::string_view session_id, const RegionInfo& region) override;
  void OnRegionRefused(absl::string_view kind, const absl::Status& why) override;
  void OnRegionQuarantined(const RegionInfo& region, QuarantineEnd until) override;

 private:
  Metrics& metrics_;
  Logger& log_;
  const std::function<void(absl::string_view)> forget_;
};

// What the metrics say of an active table.
TableInfoSample TableSampleOf(const tables::DecisionTable& table);

class ServerTableObserver final : public RegistryObserver {
 public:
  ServerTableObserver(Metrics& metrics, Logger& log, HealthBoard& health, const Clock& clock)
      : metrics_(metrics), log_(log), health_(health), clock_(clock) {}

  void OnChanged(const RegistryView* before, const RegistryView& after,
                 const tables::TableSnapshot& snapshot) override;
  void OnSynced(absl::string_view source) override;
  void OnRefused(absl::string_view source, absl::string_view origin,
                 const absl::Status& why) override;
  void OnSourceHealth(absl::string_view source, const absl::Status& health) override;

 private:
  void LogActivation(const RegistryView* before, const LineView& line);

  Metrics& metrics_;
  Logger& log_;
  HealthBoard& health_;
  const Clock& clock_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_SERVER_OBSERVERS_H_
