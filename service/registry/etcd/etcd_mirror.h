// Keeps a listener in step with everything below one prefix: reads it whole, then follows every
// revision. Reads whole again where following is impossible (the store was compacted, restored from
// an older state or replaced by another one), and goes on from the last revision after a connection
// was lost, with growing pauses between attempts.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_MIRROR_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_MIRROR_H_

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/registry/etcd/etcd_client.h"

namespace keepset::service::etcd {

// Called from the mirror's thread, one call at a time, revisions ascending but for OnRead after the
// store itself went back.
class MirrorListener {
 public:
  virtual ~MirrorListener() = default;
  // All there is; replaces whatever was told before.
  virtual void OnRead(const RangeResult& all) = 0;
  // What one revision changed.
  virtual void OnChanged(int64_t revision, const std::vector<Change>& changes) = 0;
  // From here on nothing is told until OnRead or OnInStep. Once per loss.
  virtual void OnLost(const absl::Status& why) = 0;
  // Everything up to now has been told, and every change will be.
  virtual void OnInStep() = 0;
};

struct MirrorOptions {
  std::string prefix;
  // Pause after the first failure; twice as long after each further one. Between half and all of it
  // is waited, so that a fleet does not come back in one moment.
  absl::Duration first_pause = absl::Milliseconds(100);
  absl::Duration last_pause = absl::Seconds(5);
  uint64_t seed = 0;
};

class Mirror {
 public:
  // `client` and `listener` outlive this. The client is shut down by Stop.
  Mirror(const MirrorOptions& options, Client& client, MirrorListener& listener);
  ~Mirror();  // stops
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  void Start();
  // After it returns the listener is not called any more. Not from a listener.
  void Stop();

 private:
  // How following ended; OK: at once from another revision, or by a full read.
  absl::Status Follow();
  absl::Status ReadAll();
  absl::Status Take(const WatchEvent& event);
  void Run();
  // False when stopped.
  bool Pause(absl::Duration longest);
  bool IsStopped();

  const MirrorOptions options_;
  Client& client_;
  MirrorListener& listener_;

  // The thread's own.
  std::minstd_rand random_;
  bool must_read_ = true;
  uint64_t cluster_id_ = 0;
  int64_t revision_ = 0;  // told
  enum class Told { kNothing, kInStep, kLost } told_ = Told::kNothing;

  absl::Mutex mutex_;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  WatchStream* stream_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::thread thread_;
};

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_MIRROR_H_
