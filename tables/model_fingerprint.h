// Which model a table was compiled for and a request comes from (formats.md "Model fingerprint").
#ifndef KEEPSET_TABLES_MODEL_FINGERPRINT_H_
#define KEEPSET_TABLES_MODEL_FINGERPRINT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace keepset::tables {

// Beyond any model; they bound what a stated shape can make us allocate.
inline constexpr int64_t kMaxModelLayers = 4096;
inline constexpr int64_t kMaxModelHeads = 4096;
inline constexpr int64_t kMaxHeadDim = 65536;

struct ModelFingerprint {
  std::string architecture;
  int64_t num_layers = 0;
  int64_t num_qo_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  std::optional<double> rope_theta;  // Absent when the side does not state it.
  std::string rope_json;             // The whole "rope" object, canonical JSON; empty when absent.
  std::string revision;              // Empty when not stated.

  bool operator==(const ModelFingerprint&) const = default;
};

enum class FingerprintMatch {
  kFull,   // architecture, layers, heads, KV heads, head_dim; rope and revision where both state
           // them
  kShape,  // ignores architecture, rope and revision
};
enum class LayerMatch { kExact, kInterpolateDepth };

// OK when a table compiled for `table` may serve `request`; FailedPrecondition naming the field,
// both values and how to relax. With LayerMatch::kInterpolateDepth the layer counts may differ.
absl::Status MatchFingerprint(const ModelFingerprint& table, const ModelFingerprint& request,
                              FingerprintMatch fingerprint_match, LayerMatch layer_match);

// What FingerprintMatch::kShape lets pass, one entry per field that differs, for the list `relaxed`
// of a result: "fingerprint_match: revision is "a" in the table and "b" in the request".
std::vector<std::string> ShapeRelaxations(const ModelFingerprint& table,
                                          const ModelFingerprint& request);

// One JSON object, as in formats.md. `where` prefixes error messages. ParseModelFingerprint ignores
// unknown keys and refuses missing counts, counts < 1 or beyond the limits, and num_qo_heads not a
// multiple of num_kv_heads.
absl::StatusOr<ModelFingerprint> ParseModelFingerprint(absl::string_view json,
                                                       absl::string_view where);
std::string ModelFingerprintJson(const ModelFingerprint& fingerprint);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_MODEL_FINGERPRINT_H_
