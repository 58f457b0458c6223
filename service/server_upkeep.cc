#include "service/server_upkeep.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/metrics/process_usage.h"

namespace keepset::service {
namespace {

// How often leases are checked and gauges written.
constexpr absl::Duration kPeriod = absl::Milliseconds(500);
// How often a drain looks whether workers have retired device memory of ours.
constexpr absl::Duration kRetirePoll = absl::Milliseconds(10);
// Counting descriptors and mappings takes longer than the other gauges and moves slowly.
constexpr int64_t kTicksPerUsage = 10;
// A session's connection, its side socket with the pidfd of its peer, and a descriptor on its way
// to a region.
constexpr double kDescriptorsPerSession = 4;
// Listeners, polling, the log, a scrape.
constexpr double kOwnDescriptors = 64;

}  // namespace

void WarnOfFewDescriptors(uint64_t max_sessions, Logger& log) {
  const double needed =
      kOwnDescriptors + kDescriptorsPerSession * static_cast<double>(max_sessions);
  const double allowed = ReadProcessUsage().max_fds;
  if (!(allowed < needed)) return;
  log.Warning("few_descriptors",
              {{"limit", absl::StrCat(allowed)},
               {"memory.max_sessions", absl::StrCat(max_sessions)},
               {"want", absl::StrCat("RLIMIT_NOFILE of ", needed, " or fewer sessions")}});
}

uint64_t OwnedDeviceBytes(const SessionManager& sessions) {
  uint64_t bytes = 0;
  for (const SessionCounts::ByKind& kind : sessions.Counts().regions) {
    if (SpaceOf(kind.kind) == MemorySpace::kDevice) bytes += kind.owned_bytes;
  }
  return bytes;
}

ServerUpkeep::ServerUpkeep(Surroundings surroundings) : surroundings_(std::move(surroundings)) {
  surroundings_.metrics.SetProcessUsage(ReadProcessUsage());
  WriteDeviceWorkspace();
}

void ServerUpkeep::Start() {
  thread_ = std::thread([this] { Run(); });
}

void ServerUpkeep::Stop() {
  if (!thread_.joinable()) return;
  stop_.Notify();
  thread_.join();
}

bool ServerUpkeep::AwaitDeviceMemoryRetired(absl::Duration end) {
  // A failed device is nobody's reason to wait.
  while (!device_failed_ && OwnedDeviceBytes(surroundings_.sessions) > 0) {
    const absl::Duration left = end - surroundings_.clock.Monotonic();
    if (left <= absl::ZeroDuration()) return false;
    stop_.WaitForNotificationWithTimeout(std::min(left, kRetirePoll));
  }
  return true;
}

void ServerUpkeep::Run() {
  for (int64_t tick = 0;; ++tick) {
    surroundings_.sessions.ReapExpired();
    WriteSessions();
    WriteDeviceWorkspace();
    WatchDevice();
    SweepQuarantine();
    if (tick % kTicksPerUsage == 0) surroundings_.metrics.SetProcessUsage(ReadProcessUsage());
    if (stop_.WaitForNotificationWithTimeout(kPeriod)) return;
  }
}

void ServerUpkeep::WriteSessions() {
  Metrics& metrics = surroundings_.metrics;
  const SessionCounts counts = surroundings_.sessions.Counts();
  metrics.SetSessions(counts.sessions);
  for (const SessionCounts::ByKind& kind : counts.regions) {
    metrics.SetRegions(kind.kind, kind.regions, kind.bytes);
    metrics.SetDeviceMemory(kind.kind, kind.device_bytes);
    metrics.SetOwnedMemory(kind.kind, {.bytes = kind.owned_bytes,
                                       .quarantined_regions = kind.quarantined_regions,
                                       .quarantined_bytes = kind.quarantined_bytes});
  }
}

void ServerUpkeep::WriteDeviceWorkspace() {
  const kernels::DeviceMemoryUse use = surroundings_.backend.MemoryUse();
  surroundings_.metrics.SetDeviceWorkspace({use.reserved_bytes, use.used_bytes, use.peak_bytes});
}

void ServerUpkeep::WatchDevice() {
  if (device_failed_) return;
  const absl::Status health = surroundings_.backend.Health();
  if (health.ok()) return;
  device_failed_ = true;
  surroundings_.log.Error("device_fault", {{"error", std::string(health.message())}});
  surroundings_.on_device_fault();
}

// Not on this thread, which leases and gauges wait for: a device may take its time.
void ServerUpkeep::SweepQuarantine() {
  if (is_sweeping_.exchange(true)) return;
  const absl::Status queued = surroundings_.blocking.Submit([this] {
    surroundings_.sessions.SweepQuarantine();
    is_sweeping_ = false;
  });
  if (!queued.ok()) is_sweeping_ = false;
}

}  // namespace keepset::service
