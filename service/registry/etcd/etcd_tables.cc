#include "service/registry/etcd/etcd_tables.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/registry/stable_read.h"

namespace keepset::service::etcd {
namespace {

constexpr int64_t kMaxPointerBytes = 64 * 1024;

// Keys of `all` and nothing else stay in `entries`.
template <typename Entry>
void KeepOnly(const std::set<std::string>& all, std::map<std::string, Entry>& entries) {
  std::erase_if(entries, [&](const auto& entry) { return !all.contains(entry.first); });
}

template <typename Entry>
void ForgetRevisions(std::map<std::string, Entry>& entries) {
  for (auto& [key, entry] : entries) entry.mod_revision = 0;
}

}  // namespace

void EtcdTables::Replace(const RangeResult& all) {
  if (all.cluster_id != cluster_id_) {
    // Revisions of two clusters say nothing about each other.
    ForgetRevisions(tables_);
    ForgetRevisions(signatures_);
    ForgetRevisions(lines_);
    ForgetRevisions(bad_keys_);
    cluster_id_ = all.cluster_id;
  }
  std::set<std::string> keys;
  std::set<std::string> signed_tables;
  std::vector<Change> changes;
  for (const KeyValue& pair : all.pairs) {
    keys.insert(pair.key);
    const absl::StatusOr<Key> key = layout_.Parse(pair.key);
    if (key.ok() && key->kind == Key::Kind::kSignature) {
      signed_tables.insert(layout_.TableKey(key->name, key->version));
    }
    changes.push_back({Change::Kind::kPut, pair});
  }
  KeepOnly(keys, tables_);
  KeepOnly(keys, lines_);
  KeepOnly(keys, bad_keys_);
  std::vector<std::string> unsigned_tables;
  for (const auto& [key, entry] : signatures_) {
    if (!signed_tables.contains(key)) unsigned_tables.push_back(key);
  }
  KeepOnly(signed_tables, signatures_);
  Apply(changes);
  for (const std::string& key : unsigned_tables) JudgeAgain(key);
}

void EtcdTables::Apply(const std::vector<Change>& changes) {
  // One revision may bring a table and its signature, in any order.
  std::vector<const Change*> others;
  for (const Change& change : changes) {
    if (!TakeSignature(change.pair, change.kind)) others.push_back(&change);
  }
  for (const Change* change : others) {
    if (change->kind == Change::Kind::kDelete) {
      Erase(change->pair.key);
    } else {
      Put(change->pair);
    }
  }
  for (const Change& change : changes) {
    const absl::StatusOr<Key> key = layout_.Parse(change.pair.key);
    if (key.ok() && key->kind == Key::Kind::kSignature) {
      JudgeAgain(layout_.TableKey(key->name, key->version));
    }
  }
}

bool EtcdTables::TakeSignature(const KeyValue& pair, Change::Kind kind) {
  const absl::StatusOr<Key> key = layout_.Parse(pair.key);
  if (!key.ok() || key->kind != Key::Kind::kSignature) return false;
  const std::string table_key = layout_.TableKey(key->name, key->version);
  if (kind == Change::Kind::kDelete) {
    signatures_.erase(table_key);
  } else {
    signatures_[table_key] = {pair.mod_revision, pair.value};
  }
  return true;
}

void EtcdTables::JudgeAgain(const std::string& table_key) {
  const auto found = tables_.find(table_key);
  if (found == tables_.end()) return;
  TableEntry& entry = found->second;
  if (entry.health.ok() && entry.signature == SignatureOf(table_key)) return;
  std::string value = entry.value;
  if (value.empty() && entry.table != nullptr) {
    const absl::Span<const std::byte> bytes = entry.table->file_bytes();
    value.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  Load(std::move(value), table_key, entry);
}

std::string EtcdTables::SignatureOf(const std::string& table_key) const {
  const auto found = signatures_.find(table_key);
  return found == signatures_.end() ? "" : found->second.signature;
}

std::string EtcdTables::Instance(const std::string& table_key, int64_t mod_revision) const {
  const auto found = signatures_.find(table_key);
  if (found == signatures_.end()) return absl::StrCat(mod_revision);
  return absl::StrCat(mod_revision, " signed ", found->second.mod_revision);
}

bool EtcdTables::has_missing_files() const {
  for (const auto& [key, entry] : tables_) {
    if (entry.awaited.has_value()) return true;
  }
  return false;
}

bool EtcdTables::RetryFiles() {
  bool found = false;
  for (auto& [key, entry] : tables_) {
    if (!entry.awaited.has_value()) continue;
    entry.health = LoadFile(TablePointer(*entry.awaited), key, entry);
    found = found || entry.health.ok();
  }
  return found;
}

void EtcdTables::Erase(const std::string& key) {
  tables_.erase(key);
  lines_.erase(key);
  bad_keys_.erase(key);
}

void EtcdTables::Put(const KeyValue& pair) {
  const absl::StatusOr<Key> key = layout_.Parse(pair.key);
  if (!key.ok()) {
    bad_keys_[pair.key] = {pair.mod_revision, key.status()};
    return;
  }
  if (key->kind == Key::Kind::kLine) {
    LineEntry& entry = lines_[pair.key];
    if (entry.mod_revision == pair.mod_revision) return;
    entry.key = *key;
    entry.mod_revision = pair.mod_revision;
    absl::StatusOr<LineAssignment> line = ParseLine(pair.value, pair.key);
    entry.health = line.status();
    if (line.ok()) entry.assignment = *std::move(line);
    return;
  }
  TableEntry& entry = tables_[pair.key];
  if (entry.mod_revision == pair.mod_revision) return;
  entry.key = *key;
  entry.mod_revision = pair.mod_revision;
  Load(pair.value, pair.key, entry);
}

void EtcdTables::Load(std::string value, const std::string& key, TableEntry& entry) {
  entry.awaited.reset();
  entry.health = LoadValue(value, key, entry);
  const bool is_in_table = entry.health.ok() && !IsTablePointer(value);
  entry.value = is_in_table ? "" : std::move(value);
}

absl::Status EtcdTables::LoadValue(const std::string& value, const std::string& origin,
                                   TableEntry& entry) {
  const bool is_pointer = IsTablePointer(value);
  const int64_t max_bytes = is_pointer ? kMaxPointerBytes : options_.max_value_bytes;
  if (static_cast<int64_t>(value.size()) > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        origin, ": value_bytes=", value.size(), ", want at most ", max_bytes,
        is_pointer ? " of digest and path"
                   : " (etcd.max_value_bytes), or digest and path of a file on the shared volume"));
  }
  if (!is_pointer) return LoadBytes(value, origin, entry);
  KEEPSET_ASSIGN_OR_RETURN(const TablePointer pointer, ParseTablePointer(value, origin));
  return LoadFile(pointer, origin, entry);
}

absl::Status EtcdTables::LoadFile(const TablePointer& pointer, const std::string& origin,
                                  TableEntry& entry) {
  if (entry.table != nullptr && entry.table->identity().digest == pointer.digest &&
      entry.signature == SignatureOf(layout_.TableKey(entry.key.name, entry.key.version))) {
    entry.awaited.reset();
    return absl::OkStatus();
  }
  if (options_.shared_directory.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(origin, ": path=\"", pointer.path,
                     "\" names a file, but this server has no etcd.shared_directory"));
  }
  entry.awaited = pointer;
  const std::string path = absl::StrCat(options_.shared_directory, "/", pointer.path);
  KEEPSET_ASSIGN_OR_RETURN(const FileIdentity identity, IdentityOf(path));
  // No need to wait until it has settled: the digest tells whether it is whole.
  KEEPSET_ASSIGN_OR_RETURN(std::string bytes,
                           ReadStable(path, identity, kSettleTime, LeaseUse::kNever));
  TableEntry read;
  read.key = entry.key;
  absl::Status status = LoadBytes(std::move(bytes), absl::StrCat(origin, " (", path, ")"), read);
  if (read.table == nullptr) return status;
  if (read.table->identity().digest != pointer.digest) {
    return absl::InvalidArgumentError(absl::StrCat(origin, ": ", path, " has digest ",
                                                   read.table->identity().digest, ", want ",
                                                   pointer.digest));
  }
  entry.awaited.reset();
  entry.table = std::move(read.table);
  entry.signature = std::move(read.signature);
  return absl::OkStatus();
}

absl::Status EtcdTables::LoadBytes(std::string bytes, const std::string& origin,
                                   TableEntry& entry) {
  const std::string signature = SignatureOf(layout_.TableKey(entry.key.name, entry.key.version));
  KEEPSET_ASSIGN_OR_RETURN(
      TablePtr table,
      loader_.LoadTable({.bytes = std::move(bytes), .label = origin, .signature = signature}));
  const tables::TableIdentity& identity = table->identity();
  if (identity.name != entry.key.name || identity.version != entry.key.version) {
    return absl::InvalidArgumentError(absl::StrCat(
        origin, ": holds table ", identity.name, "@", identity.version, ", want ", entry.key.name,
        "@", entry.key.version, " or the key ", layout_.TableKey(identity.name, identity.version)));
  }
  entry.signature = signature;
  // The same content stays the same object.
  if (entry.table == nullptr || entry.table->identity() != identity) entry.table = std::move(table);
  return absl::OkStatus();
}

TableTarget EtcdTables::Resolved(const std::string& name, TableTarget target) const {
  if (!target.digest.empty()) return target;
  const auto found = tables_.find(layout_.TableKey(name, target.version));
  if (found != tables_.end() && found->second.table != nullptr) {
    target.digest = found->second.table->identity().digest;
  }
  return target;
}

LineAssignment EtcdTables::Resolved(const std::string& name, LineAssignment assignment) const {
  if (assignment.active) assignment.active = Resolved(name, *assignment.active);
  if (assignment.canary) {
    assignment.canary->target = Resolved(name, assignment.canary->target);
    if (assignment.canary->salt.empty()) assignment.canary->salt = assignment.canary->target.digest;
  }
  for (auto& [alias, target] : assignment.aliases) target = Resolved(name, target);
  for (Activation& activation : assignment.history) {
    activation.target = Resolved(name, activation.target);
  }
  return assignment;
}

SourceSet EtcdTables::Set(const std::set<std::string>& known_lines) const {
  SourceSet set;
  set.rule = ActivationRule::kOnRequest;
  const LineAssignment undecided;
  for (const std::string& name : known_lines) set.assignments[name] = undecided;
  const auto fail = [&set](const std::string& origin, std::string instance, const absl::Status& why,
                           const Key& key) {
    if (why.ok()) return;
    SourceFailure failure;
    failure.origin = origin;
    failure.instance = std::move(instance);
    failure.why = why;
    failure.name = key.name;
    failure.version = key.version;
    set.failures.push_back(std::move(failure));
  };
  for (const auto& [key, entry] : tables_) {
    if (entry.table != nullptr) set.tables.push_back({.table = entry.table, .origin = key});
    fail(key, Instance(key, entry.mod_revision), entry.health, entry.key);
    set.assignments.try_emplace(entry.key.name, undecided);
  }
  for (const auto& [key, entry] : lines_) {
    fail(key, absl::StrCat(entry.mod_revision), entry.health, entry.key);
    set.assignments[entry.key.name] = Resolved(entry.key.name, entry.assignment);
  }
  for (const auto& [key, bad] : bad_keys_) {
    fail(key, absl::StrCat(bad.mod_revision), bad.why, Key());
  }
  set.shared = Shared();
  return set;
}

// Of what is there now, not of what was deleted: a server that reads it whole cannot know more.
SharedRevisions EtcdTables::Shared() const {
  SharedRevisions shared;
  const auto add = [&shared](const std::string& name, int64_t mod_revision) {
    const auto revision = static_cast<uint64_t>(mod_revision);
    shared.revision = std::max(shared.revision, revision);
    if (name.empty()) return;
    uint64_t& line = shared.lines[name];
    line = std::max(line, revision);
  };
  for (const auto& [key, entry] : tables_) add(entry.key.name, entry.mod_revision);
  for (const auto& [key, entry] : lines_) add(entry.key.name, entry.mod_revision);
  for (const auto& [key, entry] : signatures_) {
    const absl::StatusOr<Key> table = layout_.Parse(key);
    if (table.ok()) add(table->name, entry.mod_revision);
  }
  for (const auto& [key, bad] : bad_keys_) add("", bad.mod_revision);
  return shared;
}

std::map<std::string, int64_t> EtcdTables::Revisions() const {
  std::map<std::string, int64_t> revisions;
  for (const auto& [key, entry] : tables_) revisions[key] = entry.mod_revision;
  for (const auto& [key, entry] : lines_) revisions[key] = entry.mod_revision;
  for (const auto& [key, entry] : signatures_) {
    const absl::StatusOr<Key> table = layout_.Parse(key);
    if (table.ok())
      revisions[layout_.SignatureKey(table->name, table->version)] = entry.mod_revision;
  }
  return revisions;
}

}  // namespace keepset::service::etcd
