// This server's copy of what etcd says, kept in step by a Mirror and handed to the registry: every
// etcd revision becomes at most one change of the registry. Thread-safe.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_REPLICA_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_REPLICA_H_

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/registry/etcd/etcd_mirror.h"
#include "service/registry/etcd/etcd_tables.h"
#include "service/registry/registry_state.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"

namespace keepset::service::etcd {

inline constexpr absl::string_view kSourceName = "etcd";

class EtcdReplica final : public MirrorListener {
 public:
  // `registry` and `loader` outlive this.
  EtcdReplica(const TablesOptions& options, TableRegistry& registry, TableLoader& loader)
      : registry_(registry), prefix_(options.prefix), tables_(options, loader) {}

  // True when etcd was read once, false when it was found unreachable or `deadline` came first.
  bool AwaitFirstRead(absl::Time deadline);
  // True when the registry has everything up to `revision`.
  bool AwaitApplied(int64_t revision, absl::Time deadline);
  // True when it has more than it had at `revision`.
  bool AwaitNewerThan(int64_t revision, absl::Time deadline);

  // What a conditional write starts from. Nothing of other sources is in it.
  struct Base {
    int64_t revision = 0;  // applied
    // Every table of etcd, held by "upload", and every line as etcd has it.
    RegistryState state;
    std::map<std::string, int64_t> key_revisions;  // EtcdTables::Revisions

    int64_t RevisionOf(const std::string& key) const {  // 0: not there
      const auto found = key_revisions.find(key);
      return found == key_revisions.end() ? 0 : found->second;
    }
  };
  // Never newer than the registry's view. Unavailable: etcd was not read yet.
  absl::StatusOr<Base> GetBase(absl::Time now);

  // Looks again, each `period`, for files of the shared volume that were missing. Returns after
  // Stop.
  void RetryFilesUntilStopped(absl::Duration period);
  void Stop();

  void OnRead(const RangeResult& all) override;
  void OnChanged(int64_t revision, const std::vector<Change>& changes) override;
  void OnLost(const absl::Status& why) override;
  void OnInStep() override;

 private:
  void RememberLines() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Hands the set to the registry, unless etcd was emptied under tables that are served.
  void Deliver() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Health() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  TableRegistry& registry_;
  const std::string prefix_;

  absl::Mutex mutex_;
  EtcdTables tables_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> known_lines_ ABSL_GUARDED_BY(mutex_);
  int64_t revision_ ABSL_GUARDED_BY(mutex_) = 0;  // applied; 0: nothing read yet
  bool was_told_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_emptied_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_stopped_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status loss_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_REPLICA_H_
