// What a server does by the clock: leases, gauges, quarantined memory, the health of its device.
#ifndef KEEPSET_SERVICE_SERVER_UPKEEP_H_
#define KEEPSET_SERVICE_SERVER_UPKEEP_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/log.h"
#include "kernels/compute_backend.h"
#include "service/memory/session_manager.h"
#include "service/metrics/metrics.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {

// Warns where the process may hold fewer descriptors than `max_sessions` sessions need: a server
// that runs out of them refuses sessions in the middle of its work.
void WarnOfFewDescriptors(uint64_t max_sessions, Logger& log);

// Device memory of the server's own that workers may have open.
uint64_t OwnedDeviceBytes(const SessionManager& sessions);

class ServerUpkeep {
 public:
  // Everything outlives the upkeep.
  struct Surroundings {
    const Clock& clock;
    Logger& log;
    SessionManager& sessions;
    Metrics& metrics;
    kernels::ComputeBackend& backend;
    WorkQueue& blocking;  // for what may wait for a device
    std::function<void()> on_device_fault;
  };
  // Writes the gauges that a first scrape finds.
  explicit ServerUpkeep(Surroundings surroundings);
  ~ServerUpkeep() { Stop(); }

  void Start();
  // Idempotent, of one thread.
  void Stop();

  // False when workers have not retired device memory of the server's own at `end` (of the clock's
  // Monotonic). True at once when the device has failed. Thread-safe.
  bool AwaitDeviceMemoryRetired(absl::Duration end);

 private:
  void Run();
  void WriteSessions();
  void WriteDeviceWorkspace();
  void WatchDevice();
  void SweepQuarantine();

  const Surroundings surroundings_;
  std::atomic<bool> device_failed_ = false;
  std::atomic<bool> is_sweeping_ = false;
  absl::Notification stop_;
  std::thread thread_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_SERVER_UPKEEP_H_
