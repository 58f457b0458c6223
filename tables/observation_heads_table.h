// A table of kind observation_heads: which few heads decide what is kept, how each of them observes
// and how much its observation weighs (docs/observation-heads.md).
//
// An observation is one value per position. The policy pools it along the prompt, normalises it,
// weighs it and merges all of them into one score for the whole sequence, or one per group of
// layers.
#ifndef KEEPSET_TABLES_OBSERVATION_HEADS_TABLE_H_
#define KEEPSET_TABLES_OBSERVATION_HEADS_TABLE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "tables/decision_table.h"

namespace keepset::tables {

// What one observation looks at; the values of tensor `rows`.
enum class ObservedRows : int32_t {
  kLastRow = 0,     // attention of the last observed row of the prompt
  kMaxRows = 1,     // largest attention over the observed rows of the prompt
  kMeanRows = 2,    // mean attention over them
  kProbeMax = 3,    // largest attention over the rows of the probe
  kProbeMean = 4,   // mean attention over them
  kKeyNovelty = 5,  // -cos(k, mean unit key), standardised; the head is a KV head, no query is read
};
inline constexpr int32_t kNumObservedRows = 6;

// "last_row", "max_rows", "mean_rows", "probe_max", "probe_mean", "key_novelty".
absl::string_view ObservedRowsName(ObservedRows rows);
// Whether rows of a probe behind the prompt must be observed.
bool NeedsProbeRows(ObservedRows rows);

struct HeadObservation {
  int64_t layer = 0;
  int64_t head = 0;  // query head; KV head for kKeyNovelty
  ObservedRows rows = ObservedRows::kLastRow;
  float weight = 0.0f;

  bool operator==(const HeadObservation&) const = default;
};

// How the weighted observations become one score.
enum class ObservationMerge { kSum, kMax };
// What an observation of attention is divided by, outside protected positions.
enum class ObservationNormalization { kMax, kSum };

// A short text that the worker appends to the context for its queries' sake and drops again.
struct ObservationProbe {
  std::string name;
  std::string text;

  bool operator==(const ObservationProbe&) const = default;
};

// One point of the calibrated curve from the share of the score that a cut leaves outside to the
// share of prompts whose answer it loses.
struct RiskPoint {
  double outside_mass = 0.0;
  double miss_rate = 0.0;

  bool operator==(const RiskPoint&) const = default;
};

// Layers [begin, end) that share one keep set.
struct LayerGroup {
  int64_t begin = 0;
  int64_t end = 0;

  bool operator==(const LayerGroup&) const = default;
};

struct ObservationSettings {
  int64_t pool_kernel = 1;  // odd; average pooling along the prompt
  int64_t dilate = 0;       // a hit also keeps so many positions after it
  ObservationMerge merge = ObservationMerge::kSum;
  ObservationNormalization normalization = ObservationNormalization::kMax;
  std::vector<LayerGroup> layer_groups;  // empty: one set for the whole sequence
  std::optional<ObservationProbe> probe;
  std::vector<RiskPoint> risk_curve;  // empty: no prediction

  bool operator==(const ObservationSettings&) const = default;
};

class ObservationHeadsTable : public DecisionTable {
 public:
  // In the file's order, weights of 0 included.
  virtual absl::Span<const HeadObservation> observations() const = 0;
  virtual const ObservationSettings& settings() const = 0;
  // Budgets the table was evaluated at; it serves any.
  virtual absl::Span<const int64_t> budgets() const = 0;
  virtual std::optional<int64_t> default_budget() const = 0;
};

// Everything an observation_heads file states; what the compiler fills in.
struct ObservationHeadsContent {
  std::string name;
  std::string version;
  ModelFingerprint model;
  std::vector<HeadObservation> observations;
  ObservationSettings settings;
  std::vector<int64_t> budgets;
  std::optional<int64_t> default_budget;
  std::string algorithm_json = "{}";
  std::string provenance_json = "{}";  // must hold "source"
  std::string evaluation_json = "{}";
};

// The file's bytes; validated by parsing them back.
absl::StatusOr<std::string> SerializeTable(const ObservationHeadsContent& content);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_OBSERVATION_HEADS_TABLE_H_
