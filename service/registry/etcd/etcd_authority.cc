#include "service/registry/etcd/etcd_authority.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "service/registry/etcd/etcd_layout.h"
#include "service/registry/registry_changes.h"
#include "tables/safetensors.h"

namespace keepset::service::etcd {
namespace {

// For the watch to bring what it missed.
constexpr absl::Duration kCatchUp = absl::Seconds(1);
// A write, begun anew whenever somebody else wrote to the line meanwhile, when the caller sets no
// earlier deadline.
constexpr absl::Duration kLongestWrite = absl::Seconds(30);

absl::Status WithAdvice(const absl::Status& status) {
  if (!absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status)) return status;
  return absl::UnavailableError(
      absl::StrCat(status.message(),
                   "; tables are decided in etcd: this server goes on serving what it has and "
                   "takes writes again when etcd answers, see the source's health in List"));
}

// Digest of the version in etcd; empty: it is not there, or damaged.
std::string DigestIn(const RegistryState& state, const tables::TableIdentity& identity) {
  const auto line = state.lines.find(identity.name);
  if (line == state.lines.end()) return "";
  const auto loaded = line->second.loaded.find(identity.version);
  return loaded == line->second.loaded.end() ? "" : loaded->second.table->identity().digest;
}

class EtcdAuthority final : public RegistryAuthority {
 public:
  EtcdAuthority(const TablesOptions& options, Client& client, EtcdReplica& replica,
                const TableSourceContext& context)
      : options_(options),
        layout_(options.prefix),
        client_(client),
        replica_(replica),
        registry_(context.registry),
        loader_(context.loader),
        clock_(context.clock) {}

  absl::string_view kind() const override { return kSourceName; }

  absl::StatusOr<LoadReceipt> Load(const LoadArgs& args, const WriteContext& context) override {
    KEEPSET_ASSIGN_OR_RETURN(
        const TablePtr table,
        loader_.LoadTable(
            {.bytes = args.bytes, .label = args.origin, .signature = args.signature}));
    const tables::TableIdentity& identity = table->identity();
    if (!args.expected_digest.empty() && args.expected_digest != identity.digest) {
      return absl::InvalidArgumentError(absl::StrCat(args.origin, ": expected_digest=\"",
                                                     args.expected_digest.substr(0, 128),
                                                     "\", the content has ", identity.digest));
    }
    const absl::StatusOr<EtcdReplica::Base> base = replica_.GetBase(clock_.Now());
    if (!base.ok()) return WithAdvice(base.status());
    LoadReceipt receipt;
    receipt.durable = true;
    const std::string digest = DigestIn(base->state, identity);
    if (!digest.empty()) {
      if (digest != identity.digest) {
        return absl::AlreadyExistsError(
            absl::StrCat(args.origin, ": table ", identity.name, "@", identity.version,
                         " is in etcd with other content (", digest, "), want another version"));
      }
      receipt.already_loaded = true;
    }
    const std::string key = layout_.TableKey(identity.name, identity.version);
    const std::string signature_key = layout_.SignatureKey(identity.name, identity.version);
    std::vector<etcd::Write> writes;
    if (digest.empty()) {
      KEEPSET_ASSIGN_OR_RETURN(std::string value, ValueFor(args, identity));
      writes.push_back({Write::Kind::kPut, key, std::move(value)});
      // Another table's, of the same name and version.
      if (args.signature.empty()) writes.push_back({Write::Kind::kDelete, signature_key, ""});
    }
    if (!args.signature.empty()) {
      writes.push_back({Write::Kind::kPut, signature_key, args.signature});
    }
    if (!writes.empty()) {
      // A damaged value may be replaced.
      KEEPSET_RETURN_IF_ERROR(Write({{key, base->RevisionOf(key)}}, writes, Deadline(context)));
    }
    KEEPSET_ASSIGN_OR_RETURN(receipt.version, FindLoaded(identity));
    receipt.revision = ShownRevision(*registry_.View());
    return receipt;
  }

  absl::StatusOr<WriteReceipt> Activate(const TableRef& table, absl::string_view set_alias,
                                        const WriteContext& context) override {
    return ChangeLine(context, [&](RegistryState& state) {
      return ChangeActive(state, table, set_alias, context.actor, clock_.Now());
    });
  }

  absl::StatusOr<WriteReceipt> FollowNewest(absl::string_view name,
                                            const WriteContext& context) override {
    return ChangeLine(context, [&](RegistryState& state) { return ChangeToNewest(state, name); });
  }

  absl::StatusOr<WriteReceipt> Rollback(absl::string_view name,
                                        const WriteContext& context) override {
    return ChangeLine(context, [&](RegistryState& state) {
      return RollBack(state, name, context.actor, clock_.Now());
    });
  }

  absl::StatusOr<WriteReceipt> SetCanary(const TableRef& table, int basis_points,
                                         absl::string_view salt,
                                         const WriteContext& context) override {
    return ChangeLine(context, [&](RegistryState& state) {
      return ChangeCanary(state, table, basis_points, salt);
    });
  }

  absl::StatusOr<WriteReceipt> SetAlias(absl::string_view name, absl::string_view alias,
                                        const TableRef& table,
                                        const WriteContext& context) override {
    return ChangeLine(context,
                      [&](RegistryState& state) { return ChangeAlias(state, name, alias, table); });
  }

  absl::StatusOr<WriteReceipt> Unload(const TableRef& table, const WriteContext& context) override {
    TableTarget dropped;
    return ChangeLine(
        context,
        [&](RegistryState& state) -> absl::StatusOr<std::string> {
          std::string name;
          KEEPSET_ASSIGN_OR_RETURN(dropped, FindVersion(state, table, &name));
          return DropUpload(state, table);
        },
        &dropped);
  }

 private:
  using Change = absl::FunctionRef<absl::StatusOr<std::string>(RegistryState&)>;

  absl::Time Deadline(const WriteContext& context) const {
    return std::min(context.deadline, clock_.Now() + kLongestWrite);
  }

  // The bytes themselves, or where they lie on the shared volume.
  absl::StatusOr<std::string> ValueFor(const LoadArgs& args,
                                       const tables::TableIdentity& identity) {
    const auto bytes = static_cast<int64_t>(args.bytes.size());
    if (bytes <= options_.max_value_bytes) return args.bytes;
    if (options_.shared_directory.empty()) {
      return absl::ResourceExhaustedError(absl::StrCat(
          args.origin, ": table_bytes=", bytes, ", want at most ", options_.max_value_bytes,
          " (etcd.max_value_bytes), or etcd.shared_directory for larger ones"));
    }
    TablePointer pointer;
    pointer.digest = identity.digest;
    pointer.path = absl::StrCat(absl::StrReplaceAll(identity.digest, {{":", "-"}}), ".safetensors");
    KEEPSET_RETURN_IF_ERROR(tables::WriteFileAtomically(
        absl::StrCat(options_.shared_directory, "/", pointer.path), args.bytes));
    return SerializeTablePointer(pointer);
  }

  // The version in this server's registry; why this server could not take it, when etcd has it.
  absl::StatusOr<TableVersionInfo> FindLoaded(const tables::TableIdentity& identity) {
    TableRef ref;
    ref.name = identity.name;
    ref.version = identity.version;
    ref.digest = identity.digest;
    absl::StatusOr<TableVersionInfo> found = registry_.Find(ref);
    if (found.ok()) return found;
    const std::shared_ptr<const RegistryView> view = registry_.View();
    const auto line = view->lines.find(identity.name);
    if (line != view->lines.end()) {
      for (const TableVersionInfo& version : line->second->versions) {
        if (version.version == identity.version && version.state == VersionState::kFailed) {
          return absl::FailedPreconditionError(
              absl::StrCat("written to etcd, but refused by this server: ", version.reason));
        }
      }
    }
    return found;
  }

  // Commits, and waits until this server's registry has it.
  absl::Status Write(const std::vector<Condition>& conditions,
                     const std::vector<etcd::Write>& writes, absl::Time deadline) {
    const absl::StatusOr<int64_t> revision = client_.Commit(conditions, writes);
    if (!revision.ok()) return WithAdvice(revision.status());
    if (replica_.AwaitApplied(*revision, deadline)) return absl::OkStatus();
    return absl::DeadlineExceededError(
        absl::StrCat("written to etcd at revision ", *revision,
                     ", which stands, but this server's watch has not brought it yet"));
  }

  // Waits until this server's registry has what etcd has now.
  absl::Status CatchUp(absl::Time deadline) {
    const absl::StatusOr<int64_t> newest = client_.NewestRevision(layout_.root());
    if (!newest.ok()) return WithAdvice(newest.status());
    if (replica_.AwaitApplied(*newest, deadline)) return absl::OkStatus();
    return absl::DeadlineExceededError(
        absl::StrCat("etcd is at revision ", *newest,
                     ", which this server's watch has not brought yet; nothing was changed"));
  }

  // Applies `change` to the lines of etcd and writes the one it changed. `dropped`, when given, is
  // filled in by `change` with the version whose value goes.
  absl::StatusOr<WriteReceipt> ChangeLine(const WriteContext& context, Change change,
                                          const TableTarget* dropped = nullptr) {
    const absl::Time deadline = Deadline(context);
    bool is_caught_up = false;
    while (true) {
      absl::StatusOr<EtcdReplica::Base> base = replica_.GetBase(clock_.Now());
      if (!base.ok()) return WithAdvice(base.status());
      const std::map<std::string, Line> before = base->state.lines;
      const absl::StatusOr<std::string> changed = change(base->state);
      if (!changed.ok() && !is_caught_up) {
        // What it misses may stand in etcd already, written through another server.
        KEEPSET_RETURN_IF_ERROR(CatchUp(deadline));
        is_caught_up = true;
        continue;
      }
      KEEPSET_RETURN_IF_ERROR(changed.status());
      const std::string& name = *changed;
      KEEPSET_RETURN_IF_ERROR(CheckExpected(name, context));
      const std::string key = layout_.LineKey(name);
      const LineAssignment& after = base->state.lines[name].assignment;
      std::vector<etcd::Write> writes = {{etcd::Write::Kind::kPut, key, SerializeLine(after)}};
      std::vector<Condition> conditions = ConditionsOf(*base, name, after);
      if (dropped != nullptr) {
        const std::string table = layout_.TableKey(name, dropped->version);
        conditions.push_back({table, base->RevisionOf(table)});
        writes.push_back({etcd::Write::Kind::kDelete, table, ""});
        writes.push_back(
            {etcd::Write::Kind::kDelete, layout_.SignatureKey(name, dropped->version), ""});
      }
      const absl::Status written = Write(conditions, writes, deadline);
      if (written.ok()) return Receipt(name, before.at(name).assignment);
      const absl::Time now = clock_.Now();
      const bool may_repeat = context.expected_revision == 0 && now < deadline;
      if (!absl::IsAborted(written) || !may_repeat) return written;
      // What stood in the way is an event that the watch still owes.
      replica_.AwaitNewerThan(base->revision, std::min(deadline, now + kCatchUp));
    }
  }

  // The base is never newer than the view: where it is older, the conditions of the write fail.
  absl::Status CheckExpected(const std::string& name, const WriteContext& context) {
    if (context.expected_revision == 0) return absl::OkStatus();
    const std::shared_ptr<const RegistryView> view = registry_.View();
    const auto line = view->lines.find(name);
    const uint64_t revision = line == view->lines.end() ? 0 : line->second->revision;
    if (revision == context.expected_revision) return absl::OkStatus();
    return absl::AbortedError(
        absl::StrCat("table ", name, ": expected_revision=", context.expected_revision,
                     ", the line is at ", revision, "; look again and decide anew"));
  }

  // Nobody else changed the line, and what it names is still in etcd as this server saw it.
  std::vector<Condition> ConditionsOf(const EtcdReplica::Base& base, const std::string& name,
                                      const LineAssignment& assignment) const {
    std::set<std::string> keys = {layout_.LineKey(name)};
    const auto add = [&](const TableTarget& target) {
      const std::string key = layout_.TableKey(name, target.version);
      if (base.RevisionOf(key) != 0) keys.insert(key);
    };
    if (assignment.active.has_value()) add(*assignment.active);
    if (assignment.canary.has_value()) add(assignment.canary->target);
    for (const auto& [alias, target] : assignment.aliases) add(target);
    std::vector<Condition> conditions;
    conditions.reserve(keys.size());
    for (const std::string& key : keys) conditions.push_back({key, base.RevisionOf(key)});
    return conditions;
  }

  absl::StatusOr<WriteReceipt> Receipt(const std::string& name, const LineAssignment& before) {
    const std::shared_ptr<const RegistryView> view = registry_.View();
    WriteReceipt receipt;
    receipt.revision = ShownRevision(*view);
    receipt.durable = true;
    if (before.active.has_value()) receipt.previous_version = before.active->version;
    const auto line = view->lines.find(name);
    if (line != view->lines.end()) {
      receipt.line = line->second;
    } else {
      auto gone = std::make_shared<LineView>();
      gone->name = name;
      receipt.line = std::move(gone);
    }
    return receipt;
  }

  const TablesOptions options_;
  const Layout layout_;
  Client& client_;
  EtcdReplica& replica_;
  TableRegistry& registry_;
  TableLoader& loader_;
  const Clock& clock_;
};

}  // namespace

std::unique_ptr<RegistryAuthority> NewEtcdAuthority(const TablesOptions& options, Client& client,
                                                    EtcdReplica& replica,
                                                    const TableSourceContext& context) {
  return std::make_unique<EtcdAuthority>(options, client, replica, context);
}

}  // namespace keepset::service::etcd
