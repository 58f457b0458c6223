// Small valid tables as files, and the ways writers put them in place.
#ifndef KEEPSET_TESTS_FAKES_TABLE_FILES_H_
#define KEEPSET_TESTS_FAKES_TABLE_FILES_H_

#include <string>

#include "absl/strings/string_view.h"

namespace keepset::fakes {

// The bytes of a uniform compilerkv table of 2 layers and 4 heads. Tensor data ends the file: 2 x 4
// head weights, then 2 gates, 4 bytes each. Names and versions of equal length give files of equal
// length.
std::string TableBytes(absl::string_view name, absl::string_view version, float head_weight = 1.0f,
                       float gate = 0.9f);

// "sha256:<hex>", as in the table's identity.
std::string DigestOf(const std::string& table_bytes);

// A directory of its own under the test's temporary directory, removed with what is in it.
class ScratchDirectory {
 public:
  ScratchDirectory();
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(absl::string_view name) const;

 private:
  std::string path_;
};

// Opens, truncates, writes, closes: what `cp` and most editors do.
void WriteInPlace(const std::string& path, absl::string_view bytes);
// Writes a dot file beside `path` and renames it over.
void WriteAndRename(const std::string& path, absl::string_view bytes);

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_TABLE_FILES_H_
