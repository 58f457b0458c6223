#include "service/registry/etcd/etcd_replica.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "service/registry/registry_changes.h"

namespace keepset::service::etcd {

bool EtcdReplica::AwaitFirstRead(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  mutex_.AwaitWithDeadline(absl::Condition(&was_told_), deadline);
  return revision_ != 0;
}

bool EtcdReplica::AwaitApplied(int64_t revision, absl::Time deadline) {
  return AwaitNewerThan(revision - 1, deadline);
}

bool EtcdReplica::AwaitNewerThan(int64_t revision, absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  const auto is_newer = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return revision_ > revision || is_stopped_;
  };
  mutex_.AwaitWithDeadline(absl::Condition(&is_newer), deadline);
  return revision_ > revision;
}

absl::StatusOr<EtcdReplica::Base> EtcdReplica::GetBase(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  if (revision_ == 0) {
    return absl::UnavailableError(absl::StrCat("etcd was not read yet: ", loss_.message()));
  }
  Base base;
  base.revision = revision_;
  std::vector<std::string> unresolved;
  ApplySourceSet(base.state, kUploadSource, tables_.Set({}), now, unresolved);
  Settle(base.state, now);
  base.key_revisions = tables_.Revisions();
  return base;
}

void EtcdReplica::RetryFilesUntilStopped(absl::Duration period) {
  absl::MutexLock lock(&mutex_);
  while (!is_stopped_) {
    const auto has_work = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return is_stopped_ || tables_.has_missing_files();
    };
    mutex_.Await(absl::Condition(&has_work));
    if (mutex_.AwaitWithTimeout(absl::Condition(&is_stopped_), period)) return;
    if (tables_.has_missing_files() && tables_.RetryFiles()) Deliver();
  }
}

void EtcdReplica::Stop() {
  absl::MutexLock lock(&mutex_);
  is_stopped_ = true;
}

void EtcdReplica::OnRead(const RangeResult& all) {
  absl::MutexLock lock(&mutex_);
  tables_.Replace(all);
  if (revision_ == 0) RememberLines();
  loss_ = absl::OkStatus();
  Deliver();
  revision_ = all.revision;
  was_told_ = true;
}

void EtcdReplica::OnChanged(int64_t revision, const std::vector<Change>& changes) {
  absl::MutexLock lock(&mutex_);
  tables_.Apply(changes);
  Deliver();
  revision_ = revision;
}

void EtcdReplica::OnLost(const absl::Status& why) {
  absl::MutexLock lock(&mutex_);
  loss_ = why;
  was_told_ = true;
  registry_.SetSourceHealth(kSourceName, Health());
}

void EtcdReplica::OnInStep() {
  absl::MutexLock lock(&mutex_);
  loss_ = absl::OkStatus();
  registry_.SetSourceHealth(kSourceName, Health());
}

// A registry that was recovered from disk knows lines that etcd may have dropped since.
void EtcdReplica::RememberLines() {
  const std::shared_ptr<const RegistryView> view = registry_.View();
  for (const auto& [name, line] : view->lines) {
    const bool is_elsewhere =
        std::any_of(line->versions.begin(), line->versions.end(), [](const auto& version) {
          return std::any_of(version.sources.begin(), version.sources.end(),
                             [](const std::string& source) { return source != kSourceName; });
        });
    if (!is_elsewhere) known_lines_.insert(name);
  }
}

void EtcdReplica::Deliver() {
  SourceSet set = tables_.Set(known_lines_);
  const bool is_empty = set.tables.empty() && set.failures.empty() && !tables_.has_lines();
  // A prefix without a single key is a wiped or mistaken store more often than a decision.
  is_emptied_ = is_empty && !known_lines_.empty();
  if (is_emptied_) {
    registry_.SetSourceHealth(kSourceName, Health());
    return;
  }
  for (const auto& [name, assignment] : set.assignments) known_lines_.insert(name);
  registry_.Sync(kSourceName, std::move(set));
  if (!Health().ok()) registry_.SetSourceHealth(kSourceName, Health());
}

absl::Status EtcdReplica::Health() const {
  if (!loss_.ok()) {
    return {loss_.code(),
            absl::StrCat(loss_.message(), "; serving ",
                         revision_ == 0 ? "what was kept on disk"
                                        : absl::StrCat("what etcd said at revision ", revision_))};
  }
  if (is_emptied_) {
    return absl::FailedPreconditionError(
        absl::StrCat("etcd holds nothing below \"", prefix_,
                     "\"; serving what it held before. Want its tables restored, or the right "
                     "etcd.prefix and etcd.endpoints"));
  }
  return absl::OkStatus();
}

}  // namespace keepset::service::etcd
