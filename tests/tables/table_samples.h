// Small safetensors files and tables for tests: whole, or damaged in one place.
#ifndef KEEPSET_TESTS_TABLES_TABLE_SAMPLES_H_
#define KEEPSET_TESTS_TABLES_TABLE_SAMPLES_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "nlohmann/json.hpp"
#include "tables/safetensors.h"
#include "tables/table_file.h"

namespace keepset::tables {

// 8-byte length, `header` as given, `data`. Nothing is checked.
std::string RawSafetensors(absl::string_view header, absl::string_view data);

absl::Span<const std::byte> AsBytes(absl::string_view text);

absl::StatusOr<std::unique_ptr<SafetensorsFile>> ParseRaw(absl::string_view header,
                                                          absl::string_view data);

// 2 layers, 4 query heads, 2 KV heads, head_dim 8.
ModelFingerprint SmallModel();

// Budgets 256 and 128 (in that order), 2 entropy bins, 2 perplexity bins, valid.
// head_weights[b, l, h] = 0.8 + 0.1 b + 0.05 h + 0.2 l; gate_thresholds = 0.8 + 0.05 l + 0.01 cell.
CompilerKvTableContent SmallTable();

// A table file in parts, for damage that SerializeTable would refuse to write.
struct LooseTable {
  nlohmann::json document;
  std::vector<float> head_weights;     // [2, 4]
  std::vector<float> gate_thresholds;  // [2, 2, 2]
  std::vector<float> entropy_edges;    // [1]
  std::vector<float> ppl_edges;        // [1]
  std::vector<int64_t> budgets;        // empty: no budget axis
  std::string left_out;                // name of a tensor that is not written

  LooseTable();
  std::string Bytes() const;
  absl::StatusOr<std::shared_ptr<const DecisionTable>> Parse() const;
};

// A directory that goes with the object.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  std::string Path(absl::string_view name) const;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

void WriteText(const std::string& path, absl::string_view text);

}  // namespace keepset::tables

#endif  // KEEPSET_TESTS_TABLES_TABLE_SAMPLES_H_
