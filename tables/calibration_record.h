// One calibration record: what a rollout measured for one action in one state (methods.md 1.3).
//
// A record is one line of JSON. Unknown keys are ignored; a known key with null counts as absent.
#ifndef KEEPSET_TABLES_CALIBRATION_RECORD_H_
#define KEEPSET_TABLES_CALIBRATION_RECORD_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace keepset::tables {

// Candidate values of a table entry: first + step * index, index 0..size-1.
struct ActionGrid {
  double first = 0;
  double step = 0;
  int size = 0;

  float Value(int index) const { return static_cast<float>(first + step * index); }
  // nullopt when `action` lies further than a quarter step from every grid point.
  std::optional<int> IndexOf(double action) const;
};

inline constexpr ActionGrid kHeadActions = {0.8, 0.025, 29};  // 0.8..1.5
inline constexpr ActionGrid kGateActions = {0.8, 0.01, 21};   // 0.8..1.0

// What a run may log; the paper's unless it says otherwise.
struct ActionGrids {
  ActionGrid head = kHeadActions;
  ActionGrid gate = kGateActions;
};

// InvalidArgument "<name>: ..." for a grid that is not ascending, not positive or of more than
// kMaxActions values.
inline constexpr int kMaxActions = 64;
absl::Status CheckActionGrid(absl::string_view name, const ActionGrid& grid);

// Rewards are summed as integers; beyond this a loss is no measurement of a language model.
inline constexpr double kMaxAbsReward = 1 << 20;

enum class RecordKind : uint8_t { kHead, kGate };
// A weight of one query head, or one shared by the query heads of a KV head.
enum class HeadUnit : uint8_t { kQueryHead, kKvHead };
enum class PairedPolicyRule { kRequired, kOptional };

// What a record must satisfy beside its own form.
struct RecordRules {
  PairedPolicyRule paired_policy = PairedPolicyRule::kRequired;
  int64_t num_layers = 0;  // 0: not known, only the limits of model_fingerprint.h hold
  int64_t num_qo_heads = 0;
  int64_t num_kv_heads = 0;
  ActionGrids actions;
};

struct CalibrationRecord {
  RecordKind kind = RecordKind::kHead;
  HeadUnit head_unit = HeadUnit::kQueryHead;
  absl::string_view prompt_id;      // into the line or the scratch text
  absl::string_view paired_policy;  // empty when absent
  int64_t seed = 0;                 // tells repeated rollouts of one action apart; 0 when absent
  int64_t budget = 0;
  int64_t layer = 0;
  int64_t head = 0;  // index of the head unit; head records only
  int action = 0;    // index on the kind's grid
  double reward = 0;
  double entropy = 0;  // nats; gate records only
  double ppl = 0;      // gate records only
};

// InvalidArgument "<field>=<value>, want <what>" for a field, or what makes the line no JSON
// object. `scratch` keeps decoded text alive and must outlive the record's views.
absl::StatusOr<CalibrationRecord> ParseCalibrationRecord(absl::string_view line,
                                                         const RecordRules& rules,
                                                         std::string& scratch);

// Distinguishes records: equal for two records of the same kind, prompt, seed, state, action and
// paired policy, whatever they measured. The same on every run and platform.
uint64_t RecordIdentity(const CalibrationRecord& record);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_CALIBRATION_RECORD_H_
