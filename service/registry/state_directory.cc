#include "service/registry/state_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/memory/memory.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "tables/file_bytes.h"
#include "tables/safetensors.h"
#include "tables/table_file.h"
#include "tables/table_signature.h"

namespace keepset::service {
namespace {

namespace fs = std::filesystem;

constexpr absl::string_view kDocument = "registry.json";
constexpr absl::string_view kDigestPrefix = "sha256:";
constexpr absl::string_view kFilePrefix = "sha256-";
constexpr absl::string_view kFileSuffix = ".safetensors";
constexpr int64_t kMaxDocumentBytes = int64_t{256} << 20;

absl::Status SyncPath(const std::string& path, int flags) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
  if (fd < 0) return tables::FileError(errno, "open", path);
  const absl::Cleanup close_fd = [fd] { close(fd); };
  // Some file systems cannot sync a directory and say EINVAL.
  if (fsync(fd) != 0 && errno != EINVAL) return tables::FileError(errno, "sync", path);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<StateDirectory>> StateDirectory::Open(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return tables::FileError(errno, "create the state directory", path);
  }
  const std::string lock_path = absl::StrCat(path, "/.lock");
  const int fd = open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return tables::FileError(errno, "open", lock_path);
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    close(fd);
    if (error != EWOULDBLOCK) return tables::FileError(error, "lock", lock_path);
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": held by another server, want a directory of its own for each"));
  }
  auto state = absl::WrapUnique(new StateDirectory(path, fd));
  std::error_code error;
  std::vector<std::string> signed_files;
  absl::MutexLock lock(&state->mutex_);
  for (const fs::directory_entry& entry : fs::directory_iterator(path, error)) {
    const std::string file = entry.path().filename().string();
    absl::string_view hex = file;
    if (absl::ConsumePrefix(&hex, kFilePrefix) && absl::ConsumeSuffix(&hex, kFileSuffix)) {
      state->kept_.insert(absl::StrCat(kDigestPrefix, hex));
    } else if (absl::EndsWith(file, tables::SignaturePath(kFileSuffix))) {
      signed_files.push_back(path + "/" +
                             std::string(absl::StripSuffix(file, tables::SignaturePath(""))));
    } else if (absl::StartsWith(file, ".keepset-") && absl::EndsWith(file, ".tmp")) {
      // Of a server that ended while it wrote.
      std::error_code ignored;
      fs::remove(entry.path(), ignored);
    }
  }
  if (error) return tables::FileError(error.value(), "list", path);
  for (const std::string& file : signed_files) {
    // Of a server that ended before it wrote the table.
    if (!fs::exists(file, error)) fs::remove(tables::SignaturePath(file), error);
  }
  return state;
}

StateDirectory::~StateDirectory() { close(lock_fd_); }

std::string StateDirectory::FileOf(absl::string_view digest) const {
  return absl::StrCat(path_, "/", kFilePrefix, absl::StripPrefix(digest, kDigestPrefix),
                      kFileSuffix);
}

absl::StatusOr<RegistryDocument> StateDirectory::ReadDocument() {
  const std::string path = absl::StrCat(path_, "/", kDocument);
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return tables::FileError(errno, "read", path);
  if (!S_ISREG(info.st_mode) || info.st_size > kMaxDocumentBytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": file_bytes=", info.st_size,
                                                   ", want a file of at most ", kMaxDocumentBytes));
  }
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  // Not by iterators: they throw where reading fails.
  std::string text;
  char buffer[4096];
  while (file.read(buffer, sizeof(buffer)), file.gcount() > 0) text.append(buffer, file.gcount());
  if (!file.is_open() || file.bad()) {
    return tables::FileError(errno == 0 ? EIO : errno, "read", path);
  }
  KEEPSET_ASSIGN_OR_RETURN(RegistryDocument document, ParseRegistryDocument(text, path));
  absl::MutexLock lock(&mutex_);
  Name(document);
  return document;
}

void StateDirectory::Name(const RegistryDocument& document) {
  for (const StoredTable& table : document.tables) named_.insert(table.target.digest);
}

absl::Status StateDirectory::WriteDocument(const RegistryDocument& document) {
  {
    // Either may be there if this fails.
    absl::MutexLock lock(&mutex_);
    Name(document);
  }
  KEEPSET_RETURN_IF_ERROR(tables::WriteFileAtomically(absl::StrCat(path_, "/", kDocument),
                                                      SerializeRegistryDocument(document)));
  absl::MutexLock lock(&mutex_);
  named_.clear();
  Name(document);
  return absl::OkStatus();
}

bool StateDirectory::Has(absl::string_view digest) const {
  absl::MutexLock lock(&mutex_);
  return kept_.contains(digest);
}

absl::Status StateDirectory::Keep(absl::string_view digest, absl::Span<const std::byte> bytes) {
  absl::MutexLock lock(&mutex_);
  // First, so that a file never lies here without the signature it came with.
  KEEPSET_RETURN_IF_ERROR(WriteSignature(digest));
  if (kept_.contains(digest)) {
    const auto file = tables::FileBytes::Open(FileOf(digest), tables::ReadMode::kMap);
    if (file.ok() && (*file)->bytes() == bytes) return absl::OkStatus();
  }
  KEEPSET_RETURN_IF_ERROR(tables::ReplaceFile(
      FileOf(digest),
      absl::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size())));
  kept_.emplace(digest);
  if (const auto it = synced_.find(digest); it != synced_.end()) synced_.erase(it);
  return absl::OkStatus();
}

absl::Status StateDirectory::KeepSignature(absl::string_view digest, absl::string_view signature) {
  absl::MutexLock lock(&mutex_);
  unwritten_signatures_.insert_or_assign(std::string(digest), std::string(signature));
  return kept_.contains(digest) ? WriteSignature(digest) : absl::OkStatus();
}

absl::Status StateDirectory::WriteSignature(absl::string_view digest) {
  const auto signature = unwritten_signatures_.find(digest);
  if (signature == unwritten_signatures_.end()) return absl::OkStatus();
  KEEPSET_RETURN_IF_ERROR(
      tables::ReplaceFile(tables::SignaturePath(FileOf(digest)), signature->second));
  unwritten_signatures_.erase(signature);
  if (const auto it = synced_.find(digest); it != synced_.end()) synced_.erase(it);
  return absl::OkStatus();
}

std::string StateDirectory::Signature(absl::string_view digest) const {
  std::ifstream file(tables::SignaturePath(FileOf(digest)), std::ios::binary);
  std::string signature(tables::kMaxSignatureFileBytes, '\0');
  file.read(signature.data(), static_cast<std::streamsize>(signature.size()));
  signature.resize(file.gcount());
  return signature;
}

absl::Status StateDirectory::Sync(absl::string_view digest) {
  absl::MutexLock lock(&mutex_);
  if (synced_.contains(digest)) return absl::OkStatus();
  KEEPSET_RETURN_IF_ERROR(SyncPath(FileOf(digest), 0));
  const absl::Status signature = SyncPath(tables::SignaturePath(FileOf(digest)), 0);
  if (!absl::IsNotFound(signature)) KEEPSET_RETURN_IF_ERROR(signature);
  KEEPSET_RETURN_IF_ERROR(SyncPath(path_, O_DIRECTORY));
  synced_.emplace(digest);
  return absl::OkStatus();
}

absl::StatusOr<TablePtr> StateDirectory::Map(absl::string_view digest) const {
  return tables::MapTable(FileOf(digest), digest);
}

void StateDirectory::Remove(absl::string_view digest) {
  absl::MutexLock lock(&mutex_);
  RemoveLocked(digest);
}

void StateDirectory::RemoveUnnamed(absl::string_view digest) {
  absl::MutexLock lock(&mutex_);
  if (!named_.contains(digest)) RemoveLocked(digest);
}

void StateDirectory::RemoveLocked(absl::string_view digest) {
  unlink(FileOf(digest).c_str());
  unlink(tables::SignaturePath(FileOf(digest)).c_str());
  if (const auto it = unwritten_signatures_.find(digest); it != unwritten_signatures_.end()) {
    unwritten_signatures_.erase(it);
  }
  if (const auto it = kept_.find(digest); it != kept_.end()) kept_.erase(it);
  if (const auto it = synced_.find(digest); it != synced_.end()) synced_.erase(it);
}

void StateDirectory::RemoveOthers(const std::set<std::string>& digests) {
  std::vector<std::string> others;
  {
    absl::MutexLock lock(&mutex_);
    for (const std::string& digest : kept_) {
      if (!digests.contains(digest)) others.push_back(digest);
    }
  }
  for (const std::string& digest : others) Remove(digest);
}

}  // namespace keepset::service
