#include "service/registry/directory_tables.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/table_signature.h"

namespace keepset::service {
namespace {

// File time stamps move in steps; two writes within one look like one. A tick of the kernel's
// timer, or two seconds where the filesystem seems to store no fractions.
absl::Duration TimeStampStep(const FileIdentity& identity) {
  constexpr int64_t kSecond = 1'000'000'000;
  const bool whole = identity.modified_ns % kSecond == 0 && identity.changed_ns % kSecond == 0;
  return whole ? absl::Seconds(2) : absl::Milliseconds(100);
}

// A swap of the whole directory's content (`..data`) between two files of one scan starts it again.
constexpr int kMaxAttempts = 3;

constexpr absl::string_view kDirectorySource = "directory";

// Worth another try although the file stays as it is.
bool IsPassing(const absl::Status& status) {
  return absl::IsResourceExhausted(status) || absl::IsInternal(status);
}

absl::StatusOr<std::vector<std::string>> ListTableFiles(const std::string& directory) {
  DIR* dir = opendir(directory.c_str());
  if (dir == nullptr) {
    const int error = errno;
    const std::string message = absl::StrCat(directory, ": cannot list: ", std::strerror(error));
    if (error == ENOENT) return absl::NotFoundError(message);
    if (error == EACCES) return absl::PermissionDeniedError(message);
    if (error == ENOTDIR) {
      return absl::InvalidArgumentError(absl::StrCat(message, ", want a directory of tables"));
    }
    return absl::InternalError(message);
  }
  const absl::Cleanup close_dir = [dir] { closedir(dir); };
  std::vector<std::string> names;
  while (true) {
    errno = 0;
    const dirent* entry = readdir(dir);
    if (entry == nullptr) break;
    if (IsTableFileName(entry->d_name)) names.push_back(entry->d_name);
  }
  if (errno != 0) {
    return absl::InternalError(absl::StrCat(directory, ": cannot list: ", std::strerror(errno)));
  }
  std::sort(names.begin(), names.end());
  return names;
}

// One state of a file, for the registry: a refusal is told once for each.
std::string InstanceOf(const FileIdentity& identity) {
  return absl::StrCat(identity.device, ":", identity.inode, ":", identity.size_bytes, ":",
                      identity.modified_ns, ":", identity.changed_ns);
}

// Of the signature beside a table file; nothing when there is none.
absl::StatusOr<std::optional<FileIdentity>> SignatureIdentity(const std::string& table_path) {
  absl::StatusOr<FileIdentity> identity = IdentityOf(tables::SignaturePath(table_path));
  if (absl::IsNotFound(identity.status())) return std::nullopt;
  KEEPSET_RETURN_IF_ERROR(identity.status());
  return *identity;
}

// Empty without one.
absl::StatusOr<std::string> ReadSignature(const std::string& table_path,
                                          const std::optional<FileIdentity>& identity,
                                          absl::Duration unchanged_for) {
  if (!identity.has_value()) return std::string();
  const std::string path = tables::SignaturePath(table_path);
  const auto most = static_cast<int64_t>(tables::kMaxSignatureFileBytes);
  if (identity->size_bytes > most || identity->size_bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", identity->size_bytes,
                                                   " bytes, want a signature of at most ", most));
  }
  return ReadStable(path, *identity, unchanged_for, LeaseUse::kWhereGranted);
}

bool IsGone(const std::string& path) {
  struct stat st;
  return lstat(path.c_str(), &st) != 0 && errno == ENOENT;
}

}  // namespace

bool IsTableFileName(absl::string_view name) {
  constexpr absl::string_view kSuffix = ".safetensors";
  return name.size() > kSuffix.size() && name[0] != '.' && absl::EndsWith(name, kSuffix);
}

absl::StatusOr<DirectoryTables::Outcome> DirectoryTables::Scan() {
  Outcome outcome = Outcome::kUnfinished;
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListTableFiles(directory_));
    outcome = Outcome::kComplete;
    std::set<std::string> present(names.begin(), names.end());
    for (const std::string& name : names) {
      if (IsGone(absl::StrCat(directory_, "/", name))) {
        present.erase(name);
        continue;
      }
      if (Update(name, entries_[name]) == Outcome::kUnfinished) outcome = Outcome::kUnfinished;
    }
    for (auto it = entries_.begin(); it != entries_.end();) {
      it = present.contains(it->first) ? std::next(it) : entries_.erase(it);
    }
    if (IsOneMoment()) {
      registry_.Sync(kDirectorySource, Collect());
      return outcome;
    }
  }
  return Outcome::kUnfinished;
}

// Every read came before this second look, so when nothing moved, what was read stood there
// together.
bool DirectoryTables::IsOneMoment() const {
  for (const auto& [name, entry] : entries_) {
    if (!entry.decided || !entry.seen.has_value()) continue;
    const absl::StatusOr<FileIdentity> now = IdentityOf(absl::StrCat(directory_, "/", name));
    if (!now.ok() || *now != *entry.seen) return false;
    const absl::StatusOr<std::optional<FileIdentity>> signature =
        SignatureIdentity(absl::StrCat(directory_, "/", name));
    if (!signature.ok() || *signature != entry.seen_signature) return false;
  }
  return true;
}

DirectoryTables::Outcome DirectoryTables::Update(const std::string& name, Entry& entry) {
  const std::string path = absl::StrCat(directory_, "/", name);
  const absl::StatusOr<FileIdentity> identity = IdentityOf(path);
  if (!identity.ok()) {
    entry.seen.reset();
    return Refuse(name, entry, identity.status());
  }
  const absl::StatusOr<std::optional<FileIdentity>> signature = SignatureIdentity(path);
  if (!signature.ok()) return Refuse(name, entry, signature.status());
  const absl::Duration now = clock_.Monotonic();
  if (entry.seen != *identity || entry.seen_signature != *signature) {
    entry.seen = *identity;
    entry.seen_signature = *signature;
    entry.seen_since = now;
    entry.decided = false;
    entry.refusal = absl::OkStatus();
  }
  if (entry.decided && !entry.look_again) return Outcome::kComplete;

  int64_t newest_ns = std::max(identity->modified_ns, identity->changed_ns);
  if (signature->has_value()) {
    newest_ns = std::max({newest_ns, (*signature)->modified_ns, (*signature)->changed_ns});
  }
  const absl::Time newest = absl::FromUnixNanos(newest_ns);
  // The clock of a remote filesystem may be ahead of ours; what we saw ourselves counts as well.
  const absl::Duration unchanged_for = std::max(clock_.Now() - newest, now - entry.seen_since);
  absl::StatusOr<std::string> bytes =
      ReadStable(path, *identity, unchanged_for, LeaseUse::kWhereGranted);
  const absl::StatusOr<std::string> signature_bytes =
      ReadSignature(path, *signature, unchanged_for);
  if (absl::IsUnavailable(bytes.status()) || absl::IsUnavailable(signature_bytes.status())) {
    return Outcome::kUnfinished;
  }
  entry.look_again = unchanged_for < TimeStampStep(*identity) || IsPassing(bytes.status()) ||
                     IsPassing(signature_bytes.status());
  entry.decided = true;
  if (!bytes.ok()) return Refuse(name, entry, bytes.status());
  if (!signature_bytes.ok()) return Refuse(name, entry, signature_bytes.status());
  absl::StatusOr<TablePtr> table = loader_.LoadTable({*std::move(bytes), path, *signature_bytes});
  if (!table.ok()) return Refuse(name, entry, table.status());
  entry.refusal = absl::OkStatus();
  // The same bytes stay the same object: nothing changed, nothing is published.
  if (entry.latest == nullptr || entry.latest->identity() != (*table)->identity()) {
    entry.latest = *std::move(table);
  }
  return entry.look_again ? Outcome::kUnfinished : Outcome::kComplete;
}

DirectoryTables::Outcome DirectoryTables::Refuse(const std::string& name, Entry& entry,
                                                 const absl::Status& why) {
  // Deleted since it was listed: the next scan withdraws it.
  if (absl::IsNotFound(why) && IsGone(absl::StrCat(directory_, "/", name))) {
    return Outcome::kUnfinished;
  }
  entry.refusal = why;
  return entry.seen.has_value() && entry.look_again ? Outcome::kUnfinished : Outcome::kComplete;
}

SourceSet DirectoryTables::Collect() {
  SourceSet set;
  set.rule = ActivationRule::kNewest;
  using Version = std::pair<std::string, std::string>;  // name, version
  std::map<Version, std::string> owners;                // file name
  const auto version_of = [](const TablePtr& table) {
    return Version(table->identity().name, table->identity().version);
  };
  const auto fail = [&](const std::string& file, const Entry& entry, absl::Status why) {
    SourceFailure failure;
    failure.origin = file;
    failure.instance = entry.seen.has_value() ? InstanceOf(*entry.seen) : "";
    failure.why = std::move(why);
    if (entry.latest != nullptr) std::tie(failure.name, failure.version) = version_of(entry.latest);
    set.failures.push_back(std::move(failure));
  };
  std::vector<std::string> taken;
  for (auto& [file, entry] : entries_) {
    if (!entry.refusal.ok()) fail(file, entry, entry.refusal);
    if (entry.latest == nullptr) continue;
    const auto [owner, is_first] = owners.emplace(version_of(entry.latest), file);
    if (is_first) {
      entry.delivered = entry.latest;
      continue;
    }
    taken.push_back(file);
    fail(file, entry,
         absl::AlreadyExistsError(
             absl::StrCat(directory_, "/", file, ": table ", entry.latest->identity().name, "@",
                          entry.latest->identity().version, " is that of ", owner->second,
                          " already, want one file per version")));
  }
  // A file whose new table was refused goes on with what it had, unless that is taken too.
  for (const std::string& file : taken) {
    Entry& entry = entries_[file];
    if (entry.delivered != nullptr && !owners.emplace(version_of(entry.delivered), file).second) {
      entry.delivered = nullptr;
    }
  }
  for (const auto& [file, entry] : entries_) {
    if (entry.delivered != nullptr) set.tables.push_back({entry.delivered, file});
  }
  return set;
}

}  // namespace keepset::service
