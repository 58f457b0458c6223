// Records what a table registry tells, and lets a test wait for it.
#ifndef KEEPSET_TESTS_FAKES_FAKE_REGISTRY_OBSERVER_H_
#define KEEPSET_TESTS_FAKES_FAKE_REGISTRY_OBSERVER_H_

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/registry/table_registry.h"

namespace keepset::fakes {

// Thread-safe.
class FakeRegistryObserver : public service::RegistryObserver {
 public:
  struct Refusal {
    std::string file;
    absl::Status why;
  };

  void OnChanged(const service::RegistryView* /*before*/, const service::RegistryView& /*after*/,
                 const tables::TableSnapshot& snapshot) override {
    absl::MutexLock lock(&mutex_);
    std::vector<tables::TableIdentity> set;
    for (const auto& table : snapshot.tables) set.push_back(table->identity());
    published_.push_back(std::move(set));
  }

  void OnRefused(absl::string_view /*source*/, absl::string_view origin,
                 const absl::Status& why) override {
    absl::MutexLock lock(&mutex_);
    refused_.push_back({std::string(origin), why});
  }

  void OnSourceHealth(absl::string_view source, const absl::Status& health) override {
    absl::MutexLock lock(&mutex_);
    health_.push_back({std::string(source), health});
  }

  // The published sets and the refusals so far, in order.
  std::vector<std::vector<tables::TableIdentity>> published() const {
    absl::MutexLock lock(&mutex_);
    return published_;
  }
  std::vector<Refusal> refused() const {
    absl::MutexLock lock(&mutex_);
    return refused_;
  }

  // Every change of a source's health, in order; `file` is the source.
  std::vector<Refusal> health() const {
    absl::MutexLock lock(&mutex_);
    return health_;
  }

  // True when the last published set holds exactly these versions, in order of table name, before
  // the deadline.
  bool WaitForVersions(const std::vector<std::string>& versions) {
    const auto reached = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      if (published_.empty() || published_.back().size() != versions.size()) return false;
      for (size_t i = 0; i < versions.size(); ++i) {
        if (published_.back()[i].version != versions[i]) return false;
      }
      return true;
    };
    return Await(reached);
  }
  // True when the last published set holds `table` with `digest` before the deadline.
  bool WaitForDigest(const std::string& table, const std::string& digest) {
    return Await([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      if (published_.empty()) return false;
      for (const tables::TableIdentity& identity : published_.back()) {
        if (identity.name == table && identity.digest == digest) return true;
      }
      return false;
    });
  }
  // True when the last known health of `source` has this code before the deadline.
  bool WaitForHealth(const std::string& source, absl::StatusCode code) {
    return Await([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      for (auto it = health_.rbegin(); it != health_.rend(); ++it) {
        if (it->file == source) return it->why.code() == code;
      }
      return false;
    });
  }
  bool WaitForRefusals(size_t count) {
    return Await([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return refused_.size() >= count; });
  }

 private:
  // Long: only a failing test waits so long.
  static constexpr absl::Duration kDeadline = absl::Seconds(30);

  bool Await(const std::function<bool()>& condition) {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(
        absl::Condition(
            +[](const std::function<bool()>* c) { return (*c)(); }, &condition),
        kDeadline);
  }

  mutable absl::Mutex mutex_;
  std::vector<std::vector<tables::TableIdentity>> published_ ABSL_GUARDED_BY(mutex_);
  std::vector<Refusal> refused_ ABSL_GUARDED_BY(mutex_);
  std::vector<Refusal> health_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_FAKE_REGISTRY_OBSERVER_H_
