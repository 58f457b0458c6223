// The bytes of one regular file, mapped or copied. Private to tables/.
#ifndef KEEPSET_TABLES_FILE_BYTES_H_
#define KEEPSET_TABLES_FILE_BYTES_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "tables/safetensors.h"

namespace keepset::tables {

// Files that are copied are tables and manifests: small. The cap keeps a hostile file from taking
// the process's memory.
inline constexpr int64_t kMaxCopiedFileBytes = int64_t{1} << 30;

// Owns the bytes; immutable.
class FileBytes {
 public:
  // Only regular files (a FIFO or device would block or never end). NotFound, PermissionDenied,
  // InvalidArgument (not a regular file, too large to copy), Aborted (changed while it was copied).
  static absl::StatusOr<std::unique_ptr<FileBytes>> Open(const std::string& path, ReadMode mode);
  static std::unique_ptr<FileBytes> CopyOf(absl::Span<const std::byte> bytes);
  static std::unique_ptr<FileBytes> Own(std::string bytes);

  ~FileBytes();
  FileBytes(const FileBytes&) = delete;
  FileBytes& operator=(const FileBytes&) = delete;

  absl::Span<const std::byte> bytes() const;

  // Gives a mapping's pages back to the page cache; they come again when they are read.
  void ReleasePages() const;

 private:
  FileBytes() = default;

  std::string copy_;
  void* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
};

// Status for an errno of a file operation, with the codes of safetensors.h.
absl::Status FileError(int error_number, absl::string_view action, absl::string_view path);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_FILE_BYTES_H_
