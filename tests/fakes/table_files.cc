#include "tests/fakes/table_files.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "tables/table_file.h"

namespace keepset::fakes {

std::string TableBytes(absl::string_view name, absl::string_view version, float head_weight,
                       float gate) {
  tables::ModelFingerprint model;
  model.architecture = "LlamaForCausalLM";
  model.num_layers = 2;
  model.num_qo_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 16;
  tables::CompilerKvTableContent content = tables::UniformTable(model, head_weight, gate);
  content.name = std::string(name);
  content.version = std::string(version);
  const absl::StatusOr<std::string> bytes = tables::SerializeTable(content);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return bytes.ok() ? *bytes : "";
}

std::string DigestOf(const std::string& table_bytes) {
  const auto table =
      tables::ParseTable(absl::MakeConstSpan(reinterpret_cast<const std::byte*>(table_bytes.data()),
                                             table_bytes.size()),
                         "digest");
  EXPECT_TRUE(table.ok()) << table.status();
  return table.ok() ? (*table)->identity().digest : "";
}

ScratchDirectory::ScratchDirectory() : path_(testing::TempDir() + "/keepset_XXXXXX") {
  EXPECT_NE(mkdtemp(path_.data()), nullptr) << path_;
}

ScratchDirectory::~ScratchDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string ScratchDirectory::operator/(absl::string_view name) const {
  return absl::StrCat(path_, "/", name);
}

void WriteInPlace(const std::string& path, absl::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << bytes;
  file.close();
  EXPECT_TRUE(file.good()) << path;
}

void WriteAndRename(const std::string& path, absl::string_view bytes) {
  const std::filesystem::path target(path);
  const std::string aside =
      (target.parent_path() / absl::StrCat(".", target.filename().string(), ".new")).string();
  WriteInPlace(aside, bytes);
  std::filesystem::rename(aside, target);
}

}  // namespace keepset::fakes
