#include "service/registry/table_loader.h"

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

class MappingLoader final : public TableLoader {
 public:
  explicit MappingLoader(StateDirectory& state) : state_(state) {}

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
    // Where the disk does not take it, the table lives in memory; whoever needs it on disk asks for
    // that (TableRegistry) and learns why not.
    if (keep_signature().ok() && state_.Keep(digest, AsBytes(candidate.bytes)).ok()) {
      if (absl::StatusOr<TablePtr> mapped = state_.Map(digest); mapped.ok()) {
        table = *std::move(mapped);
      }
    }
    absl::MutexLock lock(&mutex_);
    absl::erase_if(loaded_, [](const auto& entry) { return entry.second.expired(); });
    loaded_[digest] = table;
    return table;
  }

 private:
  StateDirectory& state_;
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
