// One input as calibration records: both line parsers, the reader's rows and their statistics.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "tables/calibration_records.h"
#include "tables/record_scanner.h"
#include "tables/record_statistics.h"

namespace keepset::tables {
namespace {

// Where both parsers take a line they read the same fields.
void CompareScanners(absl::string_view line) {
  RawRecord fast;
  RawRecord full;
  std::string scratch;
  const std::optional<absl::Status> scanned = ScanRecordFast(line, fast);
  if (!scanned.has_value() || !scanned->ok() || !ScanRecordFully(line, full, scratch).ok()) return;
  for (int i = 0; i < static_cast<int>(RecordField::kNumFields); ++i) {
    const RawValue* a = fast.Find(static_cast<RecordField>(i));
    const RawValue* b = full.Find(static_cast<RecordField>(i));
    KEEPSET_CHECK((a == nullptr) == (b == nullptr));
    if (a == nullptr) continue;
    KEEPSET_CHECK(a->type == b->type);
    KEEPSET_CHECK(a->real == b->real);
    KEEPSET_CHECK(a->type != RawType::kString || a->text == b->text);
  }
}

void ReadAll(absl::string_view text) {
  RecordRules rules;
  rules.paired_policy = PairedPolicyRule::kOptional;
  const RecordChunk chunk = ParseRecordLines(text, rules);
  RecordLimits limits;
  limits.max_rejected = INT64_MAX;
  limits.max_states = 64;
  RecordStatistics statistics(limits, RowKeeping::kKeep);
  if (!statistics.Add(chunk).ok() || statistics.num_gate_records() == 0) return;
  const absl::StatusOr<GateStatistics> gates = statistics.BinGates(3, 2, RowKeeping::kKeep);
  if (!gates.ok()) return;
  KEEPSET_CHECK(static_cast<int64_t>(gates->rows.size()) == statistics.num_gate_records());
  for (int64_t state = 0; state < gates->states.num_states(); ++state) {
    KEEPSET_CHECK(gates->states.RewardVariance(state) >= 0);
  }
}

}  // namespace
}  // namespace keepset::tables

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    keepset::tables::CompareScanners(line);
  }
  keepset::tables::ReadAll(text);
  return 0;
}
