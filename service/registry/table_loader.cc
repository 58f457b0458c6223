#include "service/registry/table_loader.h"

#include <cstdint>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "service/registry/state_directory.h"
#include "tables/table_file.h"

namespace keepset::service {
namespace {

absl::Span<const std::byte> AsBytes(const std::string& bytes) {
  return {reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()};
}

class MemoryLoader final : public TableLoader {
 public:
  absl::StatusOr<TablePtr> LoadTable(TableCandidate candidate) override {
    return tables::ParseOwnedTable(std::move(candidate.bytes), candidate.label);
  }
};

// How many use each copy in the state directory. Thread-safe; shared by a loader and its tables.
class Copies {
 public:
  explicit Copies(StateDirectory& state) : state_(&state) {}

  // Nothing is removed from now on.
  void Leave() {
    absl::MutexLock lock(&mutex_);
    state_ = nullptr;
  }
  void Take(const std::string& digest) {
    absl::MutexLock lock(&mutex_);
    ++users_[digest];
  }
  // Under the lock, so that no copy goes that another has just taken.
  void GiveBack(const std::string& digest) {
    absl::MutexLock lock(&mutex_);
    const auto users = users_.find(digest);
    if (--users->second > 0) return;
    users_.erase(users);
    if (state_ != nullptr) state_->RemoveUnnamed(digest);
  }

 private:
  absl::Mutex mutex_;
  StateDirectory* state_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, int64_t> users_ ABSL_GUARDED_BY(mutex_);
};

// One user of a copy.
class CopyUse {
 public:
  CopyUse(std::shared_ptr<Copies> copies, std::string digest)
      : copies_(std::move(copies)), digest_(std::move(digest)) {
    copies_->Take(digest_);
  }
  ~CopyUse() { copies_->GiveBack(digest_); }
  CopyUse(const CopyUse&) = delete;
  CopyUse& operator=(const CopyUse&) = delete;

 private:
  const std::shared_ptr<Copies> copies_;
  const std::string digest_;
};

class MappingLoader final : public TableLoader {
 public:
  explicit MappingLoader(StateDirectory& state)
      : state_(state), copies_(std::make_shared<Copies>(state)) {}
  ~MappingLoader() override { copies_->Leave(); }

  absl::StatusOr<TablePtr> LoadTable(TableCandidate candidate) override {
    const std::string digest = tables::FileDigest(AsBytes(candidate.bytes));
    const auto keep_signature = [&] {
      if (candidate.signature.empty()) return absl::OkStatus();
      return state_.KeepSignature(digest, candidate.signature);
    };
    {
      absl::MutexLock lock(&mutex_);
      if (TablePtr table = loaded_[digest].lock()) {
        // The disk is asked again when the table has to be saved.
        keep_signature().IgnoreError();
        return table;
      }
    }
    // Validated as it came, so that messages name it and nothing refused reaches the disk.
    KEEPSET_ASSIGN_OR_RETURN(TablePtr table,
                             tables::ParseTable(AsBytes(candidate.bytes), candidate.label));
    auto use = std::make_shared<CopyUse>(copies_, digest);
    // Where the disk does not take it, the table lives in memory; whoever needs it on disk asks for
    // that (TableRegistry) and learns why not.
    if (keep_signature().ok() && state_.Keep(digest, AsBytes(candidate.bytes)).ok()) {
      if (absl::StatusOr<TablePtr> mapped = state_.Map(digest); mapped.ok()) {
        table = *std::move(mapped);
      }
    }
    const tables::DecisionTable* const content = table.get();
    table = TablePtr(content, [use = std::move(use),
                               inner = std::move(table)](const tables::DecisionTable*) mutable {
      // The mapping ends before its use does; both now, since `loaded_` keeps this function.
      inner.reset();
      use.reset();
    });
    absl::MutexLock lock(&mutex_);
    absl::erase_if(loaded_, [](const auto& entry) { return entry.second.expired(); });
    loaded_[digest] = table;
    return table;
  }

 private:
  StateDirectory& state_;
  const std::shared_ptr<Copies> copies_;
  absl::Mutex mutex_;
  absl::flat_hash_map<std::string, std::weak_ptr<const tables::DecisionTable>> loaded_
      ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<TableLoader> NewTableLoader() { return std::make_unique<MemoryLoader>(); }

std::unique_ptr<TableLoader> NewMappingTableLoader(StateDirectory& state) {
  return std::make_unique<MappingLoader>(state);
}

}  // namespace keepset::service
