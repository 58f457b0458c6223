// What one calibration prompt showed: every candidate observation as a row over the positions, and
// how much the full-cache continuation attended to each position (docs/observation-heads.md).
#ifndef KEEPSET_TABLES_OBSERVATION_RECORD_H_
#define KEEPSET_TABLES_OBSERVATION_RECORD_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tables/model_fingerprint.h"
#include "tables/observation_heads_table.h"
#include "tables/safetensors.h"

namespace keepset::tables {

struct ObservationRecord {
  ModelFingerprint model;
  std::string prompt_id;
  std::string task;
  int64_t seq_len = 0;
  std::vector<LayerGroup> protected_ranges;  // positions [begin, end): ascending, disjoint
  std::optional<ObservationProbe> probe;
  std::vector<HeadObservation> candidates;  // [N], weight 1
  std::vector<float> scores;                // [N, T], rows reduced; not pooled, not normalised
  std::vector<float> need;                  // [T], at least 0
  std::string digest;                       // of the file
};

// A safetensors file: `heads` I32 [N, 2], `rows` I32 [N], `scores` F32, F16 or BF16 [N, T], `need`
// F32 [T], and JSON {"format": "keepset.observations", "format_version": 1, "model": {..},
// "prompt_id", "task", "seq_len", "protected": [[begin, end]..], "probe": {"name", "text"}}.
// Attention is at least 0. Errors as in table_file.h.
absl::StatusOr<ObservationRecord> ReadObservationRecord(const std::string& path);
absl::StatusOr<ObservationRecord> ParseObservationRecord(const SafetensorsFile& file);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_OBSERVATION_RECORD_H_
