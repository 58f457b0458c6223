#include "service/registry/table_registry.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "service/registry/registry_changes.h"
#include "service/registry/registry_document.h"
#include "service/registry/registry_recovery.h"
#include "service/registry/registry_state.h"
#include "service/registry/state_directory.h"

namespace keepset::service {
namespace {

// Revisions are reserved in the state directory in blocks, so that not every one needs a write.
constexpr uint64_t kRevisionBlock = 1000;

bool SameLine(const LineView& a, const LineView& b) {
  return a.assignment == b.assignment && a.versions == b.versions;
}

class TableRegistryImpl final : public TableRegistry {
 public:
  explicit TableRegistryImpl(const TableRegistryOptions& options)
      : store_(*options.store),
        clock_(*options.clock),
        observer_(options.observer),
        disk_(options.state) {}

  absl::Status Recover(const TableRegistryOptions& options) {
    absl::MutexLock lock(&change_mutex_);
    RegistryState state;
    if (disk_ != nullptr) {
      KEEPSET_ASSIGN_OR_RETURN(Recovered recovered, RecoverState(*disk_, options.recovery_check,
                                                                 options.sources, clock_.Now()));
      state = std::move(recovered.state);
      revision_ = revision_limit_ = recovered.revision;
      recovery_problem_ = recovered.problem;
      withheld_ = std::move(recovered.withheld);
    }
    Settle(state, clock_.Now());
    const auto failures = state.failures;
    Commit(std::move(state), Saving::kWherePossible).IgnoreError();
    if (observer_ != nullptr) {
      for (const auto& [at, failure] : failures) {
        observer_->OnRefused(kStateSource, failure.origin, failure.why);
      }
    }
    return absl::OkStatus();
  }

  SyncOutcome Sync(absl::string_view source, SourceSet set) override {
    absl::MutexLock lock(&change_mutex_);
    RegistryState next = *state_;
    SyncOutcome outcome;
    const auto before = next.failures;
    ApplySourceSet(next, source, std::move(set), clock_.Now(), outcome.unresolved);
    Settle(next, clock_.Now());
    SetHealth(next, source, absl::OkStatus());
    std::vector<SourceFailure> refused;
    for (const auto& [at, failure] : next.failures) {
      if (at.first != source || failure.why.ok()) continue;
      const auto old = before.find(at);
      if (old == before.end() || old->second.instance != failure.instance ||
          old->second.why != failure.why) {
        refused.push_back(failure);
      }
    }
    Commit(std::move(next), Saving::kWherePossible).IgnoreError();
    if (observer_ != nullptr) {
      observer_->OnSynced(source);
      for (const SourceFailure& failure : refused) {
        observer_->OnRefused(source, failure.origin, failure.why);
      }
    }
    outcome.revision = revision_;
    return outcome;
  }

  void SetSourceHealth(absl::string_view source, const absl::Status& health) override {
    absl::MutexLock lock(&change_mutex_);
    RegistryState next = *state_;
    SetHealth(next, source, health);
    Commit(std::move(next), Saving::kWherePossible).IgnoreError();
  }

  std::shared_ptr<const RegistryView> View() const override {
    absl::MutexLock lock(&view_mutex_);
    return view_;
  }

  absl::StatusOr<TableVersionInfo> Find(const TableRef& ref) const override {
    std::shared_ptr<const RegistryState> state;
    std::shared_ptr<const RegistryView> view;
    {
      absl::MutexLock lock(&view_mutex_);
      state = published_;
      view = view_;
    }
    std::string name;
    KEEPSET_ASSIGN_OR_RETURN(const TableTarget target, FindVersion(*state, ref, &name));
    for (const TableVersionInfo& version : view->lines.at(name)->versions) {
      const bool loaded =
          version.state == VersionState::kActive || version.state == VersionState::kReady;
      if (loaded && version.digest == target.digest) return version;
    }
    return absl::InternalError(absl::StrCat(DescribeRef(ref), ": found, but not in the view"));
  }

  std::shared_ptr<const RegistryView> Subscribe(
      uint64_t* id, std::function<void(std::shared_ptr<const RegistryView>)> listener) override {
    absl::MutexLock lock(&listener_mutex_);
    *id = ++last_listener_;
    listeners_[*id] = std::move(listener);
    return View();
  }

  void Unsubscribe(uint64_t id) override {
    absl::MutexLock lock(&listener_mutex_);
    listeners_.erase(id);
  }

  absl::StatusOr<LoadReceipt> Load(SourceTable table, const WriteContext& /*context*/) override {
    absl::MutexLock lock(&change_mutex_);
    const tables::TableIdentity identity = table.table->identity();
    LoadReceipt receipt;
    RegistryState next = *state_;
    const auto line = next.lines.find(identity.name);
    receipt.already_loaded =
        line != next.lines.end() &&
        FindTarget(line->second, {identity.version, identity.digest}) != nullptr;
    absl::Status status = AddUpload(next, table, clock_.Now());
    if (status.ok()) {
      Settle(next, clock_.Now());
      status = Commit(std::move(next), Saving::kRequired);
    }
    if (!status.ok()) {
      // A loader may have kept the file already.
      if (disk_ != nullptr && !HoldsDigest(*state_, identity.digest))
        disk_->Remove(identity.digest);
      return status;
    }
    receipt.revision = revision_;
    receipt.durable = disk_ != nullptr;
    const std::shared_ptr<const LineView> published = View()->lines.at(identity.name);
    for (const TableVersionInfo& version : published->versions) {
      if (version.digest == identity.digest && version.state != VersionState::kRetired) {
        receipt.version = version;
      }
    }
    return receipt;
  }

  absl::StatusOr<WriteReceipt> Activate(const TableRef& table, absl::string_view set_alias,
                                        const WriteContext& context) override {
    return Change(context, [&](RegistryState& next) {
      return ChangeActive(next, table, set_alias, context.actor, clock_.Now());
    });
  }
  absl::StatusOr<WriteReceipt> FollowNewest(absl::string_view name,
                                            const WriteContext& context) override {
    return Change(context, [&](RegistryState& next) { return ChangeToNewest(next, name); });
  }
  absl::StatusOr<WriteReceipt> Rollback(absl::string_view name,
                                        const WriteContext& context) override {
    return Change(context, [&](RegistryState& next) {
      return RollBack(next, name, context.actor, clock_.Now());
    });
  }
  absl::StatusOr<WriteReceipt> SetCanary(const TableRef& table, int basis_points,
                                         absl::string_view salt,
                                         const WriteContext& context) override {
    return Change(context, [&](RegistryState& next) {
      return ChangeCanary(next, table, basis_points, salt);
    });
  }
  absl::StatusOr<WriteReceipt> SetAlias(absl::string_view name, absl::string_view alias,
                                        const TableRef& table,
                                        const WriteContext& context) override {
    return Change(context,
                  [&](RegistryState& next) { return ChangeAlias(next, name, alias, table); });
  }
  absl::StatusOr<WriteReceipt> Unload(const TableRef& table, const WriteContext& context) override {
    return Change(context, [&](RegistryState& next) { return DropUpload(next, table); });
  }

 private:
  enum class Saving {
    kWherePossible,  // a failure is told and does not stop the change
    kRequired,       // a failure stops the change
  };

  // One operator's change of one line.
  absl::StatusOr<WriteReceipt> Change(
      const WriteContext& context,
      absl::FunctionRef<absl::StatusOr<std::string>(RegistryState&)> change) {
    absl::MutexLock lock(&change_mutex_);
    RegistryState next = *state_;
    KEEPSET_ASSIGN_OR_RETURN(const std::string name, change(next));
    const std::shared_ptr<const RegistryView> before = View();
    const auto line = before->lines.find(name);
    const uint64_t revision = line == before->lines.end() ? 0 : line->second->revision;
    if (context.expected_revision != 0 && context.expected_revision != revision) {
      return absl::AbortedError(
          absl::StrCat("table ", name, ": expected_revision=", context.expected_revision,
                       ", the line is at ", revision, "; look again and decide anew"));
    }
    Settle(next, clock_.Now());
    KEEPSET_RETURN_IF_ERROR(Commit(std::move(next), Saving::kRequired));
    WriteReceipt receipt;
    receipt.revision = revision_;
    receipt.durable = disk_ != nullptr;
    if (line != before->lines.end() && line->second->assignment.active.has_value()) {
      receipt.previous_version = line->second->assignment.active->version;
    }
    const std::shared_ptr<const RegistryView> after = View();
    const auto changed = after->lines.find(name);
    if (changed != after->lines.end()) {
      receipt.line = changed->second;
    } else {
      auto gone = std::make_shared<LineView>();
      gone->name = name;
      receipt.line = std::move(gone);
    }
    return receipt;
  }

  void SetHealth(RegistryState& state, absl::string_view source, const absl::Status& health) const {
    SourceView& view = state.sources[std::string(source)];
    if (!view.source.empty() && view.health == health) return;
    view.source = std::string(source);
    view.health = health;
    view.since = clock_.Now();
  }

  // Makes `next` the state: saved, published, told. Nothing happens when nothing changed.
  absl::Status Commit(RegistryState next, Saving saving)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_) {
    if (disk_ != nullptr) {
      ForgetServed(next);
      absl::Status saved = Save(next);
      if (!saved.ok() && saving == Saving::kRequired) return saved;
      SetHealth(next, kStateSource, saved.ok() ? recovery_problem_ : saved);
    }
    const std::shared_ptr<const RegistryView> before = View();
    std::shared_ptr<const RegistryView> after = BuildView(next, before.get());
    if (after == nullptr) return absl::OkStatus();
    revision_ = after->revision;
    const std::set<std::string> unused = UnusedDigests(*state_, next);
    state_ = std::make_shared<const RegistryState>(std::move(next));
    Publish(before, after, state_);
    if (disk_ != nullptr) {
      for (const std::string& digest : unused) disk_->Remove(digest);
    }
    return absl::OkStatus();
  }

  // What recovery had to leave out and came back meanwhile, signed or whole, is out no more.
  void ForgetServed(RegistryState& next) ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_) {
    if (recovery_problem_.ok()) return;
    const size_t failures = std::erase_if(next.failures, [&next](const auto& entry) {
      const auto line = next.lines.find(entry.second.name);
      return entry.first.first == kStateSource && line != next.lines.end() &&
             line->second.loaded.contains(entry.second.version);
    });
    std::erase_if(withheld_, [&next](const StoredTable& table) {
      return HoldsDigest(next, table.target.digest);
    });
    if (failures == 0) return;
    const bool is_left =
        std::any_of(next.failures.begin(), next.failures.end(),
                    [](const auto& entry) { return entry.first.first == kStateSource; });
    if (!is_left) recovery_problem_ = absl::OkStatus();
  }

  // The view after a change, or nullptr when `next` looks as the view before.
  std::shared_ptr<const RegistryView> BuildView(const RegistryState& next,
                                                const RegistryView* before) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_) {
    const std::set<std::string>* const saved = &saved_digests_;
    const auto is_durable = [saved](const std::string& digest) { return saved->contains(digest); };
    auto view = std::make_shared<RegistryView>();
    view->revision = revision_ + 1;
    bool changed = before == nullptr || before->lines.size() != next.lines.size();
    for (const auto& [name, line] : next.lines) {
      std::shared_ptr<LineView> fresh = ViewOf(next, name, is_durable);
      if (before != nullptr) {
        const auto old = before->lines.find(name);
        if (old != before->lines.end() && SameLine(*old->second, *fresh) &&
            line.shared_revision.value_or(old->second->revision) == old->second->revision) {
          view->lines[name] = old->second;
          continue;
        }
      }
      changed = true;
      fresh->revision = line.shared_revision.value_or(view->revision);
      view->lines[name] = std::move(fresh);
    }
    view->nameless = NamelessOf(next);
    for (const auto& [name, source] : next.sources) view->sources.push_back(source);
    view->shared_revision = next.shared_revision;
    changed = changed || view->nameless != before->nameless || view->sources != before->sources ||
              view->shared_revision != before->shared_revision;
    return changed ? view : nullptr;
  }

  void Publish(const std::shared_ptr<const RegistryView>& before,
               const std::shared_ptr<const RegistryView>& after,
               std::shared_ptr<const RegistryState> state) {
    tables::TableSnapshot snapshot = SnapshotOf(*state);
    snapshot.revision = after->revision;
    absl::MutexLock lock(&listener_mutex_);
    store_.PublishSnapshot(std::move(snapshot));
    {
      absl::MutexLock view_lock(&view_mutex_);
      view_ = after;
      published_ = std::move(state);
    }
    if (observer_ != nullptr) {
      observer_->OnChanged(before.get(), *after, *store_.Snapshot());
      for (const SourceView& source : after->sources) {
        if (HealthChanged(before.get(), source)) {
          observer_->OnSourceHealth(source.source, source.health);
        }
      }
    }
    for (const auto& [id, listener] : listeners_) listener(after);
  }

  static bool HealthChanged(const RegistryView* before, const SourceView& now) {
    if (before != nullptr) {
      for (const SourceView& source : before->sources) {
        if (source.source == now.source) return source.health != now.health;
      }
    }
    return true;
  }

  absl::Status Save(const RegistryState& next) ABSL_EXCLUSIVE_LOCKS_REQUIRED(change_mutex_) {
    const auto is_kept = [this](const std::string& digest) { return disk_->Has(digest); };
    const std::vector<TablePtr> needed = TablesToKeep(next);
    for (const TablePtr& table : needed) {
      const std::string& digest = table->identity().digest;
      if (!disk_->Has(digest)) KEEPSET_RETURN_IF_ERROR(disk_->Keep(digest, table->file_bytes()));
    }
    RegistryDocument document = DocumentOf(next, is_kept);
    const bool more_revisions = revision_ + 1 >= revision_limit_;
    document.tables.insert(document.tables.end(), withheld_.begin(), withheld_.end());
    document.revision_limit = more_revisions ? revision_ + kRevisionBlock : revision_limit_;
    if (saved_ == document) return absl::OkStatus();
    for (const TablePtr& table : needed) {
      KEEPSET_RETURN_IF_ERROR(disk_->Sync(table->identity().digest));
    }
    KEEPSET_RETURN_IF_ERROR(disk_->WriteDocument(document));
    revision_limit_ = document.revision_limit;
    saved_digests_.clear();
    for (const StoredTable& table : document.tables) saved_digests_.insert(table.target.digest);
    saved_ = std::move(document);
    return absl::OkStatus();
  }

  tables::TableStore& store_;
  const Clock& clock_;
  RegistryObserver* const observer_;
  StateDirectory* const disk_;

  // Lock order: change, listener, view.
  mutable absl::Mutex change_mutex_;
  std::shared_ptr<const RegistryState> state_ ABSL_GUARDED_BY(change_mutex_) =
      std::make_shared<const RegistryState>();
  uint64_t revision_ ABSL_GUARDED_BY(change_mutex_) = 0;
  uint64_t revision_limit_ ABSL_GUARDED_BY(change_mutex_) = 0;
  RegistryDocument saved_ ABSL_GUARDED_BY(change_mutex_);
  std::set<std::string> saved_digests_ ABSL_GUARDED_BY(change_mutex_);
  absl::Status recovery_problem_ ABSL_GUARDED_BY(change_mutex_);
  std::vector<StoredTable> withheld_ ABSL_GUARDED_BY(change_mutex_);

  absl::Mutex listener_mutex_;
  absl::flat_hash_map<uint64_t, std::function<void(std::shared_ptr<const RegistryView>)>> listeners_
      ABSL_GUARDED_BY(listener_mutex_);
  uint64_t last_listener_ ABSL_GUARDED_BY(listener_mutex_) = 0;

  mutable absl::Mutex view_mutex_;
  std::shared_ptr<const RegistryView> view_ ABSL_GUARDED_BY(view_mutex_);
  std::shared_ptr<const RegistryState> published_ ABSL_GUARDED_BY(view_mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<TableRegistry>> TableRegistry::New(
    const TableRegistryOptions& options) {
  auto registry = std::make_unique<TableRegistryImpl>(options);
  KEEPSET_RETURN_IF_ERROR(registry->Recover(options));
  return registry;
}

}  // namespace keepset::service
