#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "service/registry/directory_tables.h"
#include "service/registry/directory_watch.h"
#include "service/registry/table_source.h"

namespace keepset::service {
namespace {

// An unfinished file, or a directory that is gone, is looked at again after the first of these,
// then twice as long up to the second; any event begins anew.
constexpr absl::Duration kFirstRetry = absl::Milliseconds(100);
constexpr absl::Duration kLastRetry = absl::Seconds(2);

// A storm that never pauses is read at least this often.
constexpr int kMaxDebounces = 20;

class DirectorySource : public TableSource {
 public:
  DirectorySource(const DirectorySourceOptions& options, const TableSourceContext& context)
      : options_(options),
        registry_(context.registry),
        clock_(context.clock),
        tables_(options.directory, context.registry, context.loader, context.clock) {}

  ~DirectorySource() override { Stop(); }

  absl::string_view kind() const override { return "directory"; }

  absl::Status Start() override {
    absl::MutexLock lock(&mutex_);
    if (thread_.joinable()) {
      return absl::FailedPreconditionError(
          absl::StrCat(options_.directory, ": is watched already"));
    }
    KEEPSET_ASSIGN_OR_RETURN(watch_, DirectoryWatch::New());
    // Watched before it is read: what changes in between is an event, not a loss.
    KEEPSET_RETURN_IF_ERROR(watch_->Watch(options_.directory));
    KEEPSET_ASSIGN_OR_RETURN(const DirectoryTables::Outcome outcome, tables_.Scan());
    thread_ = std::thread([this, watch = watch_.get(), outcome] { Run(*watch, outcome); });
    return absl::OkStatus();
  }

  void Stop() override {
    absl::MutexLock lock(&mutex_);
    if (!thread_.joinable()) return;
    watch_->Stop();
    thread_.join();
  }

 private:
  void Run(DirectoryWatch& watch, DirectoryTables::Outcome outcome) {
    absl::Duration retry = kFirstRetry;
    bool unfinished = outcome == DirectoryTables::Outcome::kUnfinished;
    while (true) {
      DirectoryWatch::Wake wake =
          watch.Wait(unfinished ? std::min(retry, options_.rescan) : options_.rescan);
      const bool changed = wake == DirectoryWatch::Wake::kChanged;
      if (changed) wake = WaitUntilQuiet(watch);
      if (wake == DirectoryWatch::Wake::kStopped) return;
      unfinished = Rescan(watch);
      retry = changed || !unfinished ? kFirstRetry : std::min(2 * retry, kLastRetry);
    }
  }

  DirectoryWatch::Wake WaitUntilQuiet(DirectoryWatch& watch) {
    const absl::Duration latest = clock_.Monotonic() + kMaxDebounces * options_.debounce;
    DirectoryWatch::Wake wake = DirectoryWatch::Wake::kChanged;
    while (wake == DirectoryWatch::Wake::kChanged && clock_.Monotonic() < latest) {
      wake = watch.Wait(options_.debounce);
    }
    return wake;
  }

  // True when it must be repeated soon.
  bool Rescan(DirectoryWatch& watch) {
    absl::Status status = watch.Watch(options_.directory);
    bool unfinished = false;
    if (status.ok()) {
      const absl::StatusOr<DirectoryTables::Outcome> outcome = tables_.Scan();
      status = outcome.status();
      unfinished = outcome.ok() && *outcome == DirectoryTables::Outcome::kUnfinished;
    }
    if (status.ok()) return unfinished;
    registry_.SetSourceHealth(kind(), status);
    return true;
  }

  const DirectorySourceOptions options_;
  TableRegistry& registry_;
  const Clock& clock_;

  absl::Mutex mutex_;
  std::unique_ptr<DirectoryWatch> watch_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_ ABSL_GUARDED_BY(mutex_);

  // Start's, before there is a thread, then the thread's.
  DirectoryTables tables_;
};

}  // namespace

std::unique_ptr<TableSource> NewDirectorySource(const TableSourceOptions& options,
                                                const TableSourceContext& context) {
  return std::make_unique<DirectorySource>(options.directory, context);
}

}  // namespace keepset::service
