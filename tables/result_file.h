// Writing result files (formats.md "Result").
#ifndef KEEPSET_TABLES_RESULT_FILE_H_
#define KEEPSET_TABLES_RESULT_FILE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "tables/decision_table.h"
#include "tables/safetensors.h"

namespace keepset::tables {

struct ResultLayer {
  // One element, or one per KV head in scope kv_head. Empty candidates or filled: null in the file.
  std::vector<int64_t> candidates;
  std::vector<int64_t> kept;
  std::vector<int64_t> filled;
  std::optional<double> tau;
  // Written only where stated: alpha_scope layer or head.
  std::optional<double> entropy;
  std::optional<int64_t> entropy_bin;
};

// The JSON document of a result; absent values are null in the file.
struct ResultDocument {
  std::string outcome;
  std::string reason;
  std::string policy;
  std::string scope;
  int64_t seq_len = 0;
  std::optional<TableIdentity> table;
  std::optional<double> entropy;
  std::optional<double> ppl;
  std::optional<int64_t> entropy_bin;
  std::optional<int64_t> ppl_bin;
  // Written when present.
  std::optional<double> outside_mass;
  std::optional<double> predicted_miss_rate;
  std::vector<ResultLayer> layers;  // [num_layers]
  std::vector<std::string> defaulted_inputs;
  std::vector<std::string> relaxed;
  std::string backend;
  int64_t bytes_before = 0;
  int64_t bytes_after = 0;
};

// One line, keys in the order of formats.md.
std::string ResultJson(const ResultDocument& document);

// Set number of a set that all KV heads share.
inline constexpr int64_t kSharedSet = -1;

struct ResultIndexSet {
  int64_t layer = 0;
  int64_t set = kSharedSet;           // or the KV head
  absl::Span<const int32_t> indices;  // [n], strictly ascending, < seq_len
};

// Compacted rows of one set, contiguous, bit-equal to the source.
struct ResultGathered {
  int64_t layer = 0;
  int64_t set = kSharedSet;
  TensorDType dtype = TensorDType::kF32;
  int64_t num_kv_heads = 1;  // 1 for the set of one head
  int64_t num_tokens = 0;    // n of the set
  int64_t k_head_dim = 0;
  int64_t v_head_dim = 0;
  absl::Span<const std::byte> k;  // [num_kv_heads, n, k_head_dim]
  absl::Span<const std::byte> v;  // [num_kv_heads, n, v_head_dim]
};

// The file's bytes. InvalidArgument when the document is not a result, sets are missing, repeated,
// not ascending, out of seq_len, or disagree with `kept`, or gathered rows disagree with their set.
absl::StatusOr<std::string> SerializeResult(absl::string_view result_json,
                                            absl::Span<const ResultIndexSet> sets,
                                            absl::Span<const ResultGathered> gathered);

// SerializeResult and WriteFileAtomically: a failure leaves no file.
absl::Status WriteResultFile(const std::string& path, absl::string_view result_json,
                             absl::Span<const ResultIndexSet> sets,
                             absl::Span<const ResultGathered> gathered);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_RESULT_FILE_H_
