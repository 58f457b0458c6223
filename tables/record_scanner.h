// The fields of a calibration record as they stand in its line, before their meaning is checked.
// Private to tables/.
//
// ScanRecordFast reads the plain lines that rollouts write, several times faster than a general
// parser; a line with escapes, non-ASCII text or numbers beyond double is left to ScanRecordFully,
// which gives the same fields.
#ifndef KEEPSET_TABLES_RECORD_SCANNER_H_
#define KEEPSET_TABLES_RECORD_SCANNER_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace keepset::tables {

enum class RecordField : uint8_t {
  kKind,
  kPromptId,
  kSeed,
  kBudget,
  kLayer,
  kHead,
  kKvHead,
  kAction,
  kFullLoss,
  kCompressedLoss,
  kLoss,  // {"full": x, "compressed": y}
  kReward,
  kSequenceLength,
  kCandidateCount,
  kEntropy,
  kPpl,
  kPairedPolicy,
  kNumFields
};

absl::string_view RecordFieldName(RecordField field);

enum class RawType : uint8_t { kInteger, kReal, kString, kNotFinite, kOther };

struct RawValue {
  RawType type = RawType::kOther;
  int64_t integer = 0;     // kInteger
  double real = 0;         // kInteger, kReal
  absl::string_view text;  // kString: the decoded text; otherwise as written, for messages
};

class RawRecord {
 public:
  // nullptr when absent or null.
  const RawValue* Find(RecordField field) const {
    return (present_ & Bit(field)) != 0 ? &values_[static_cast<int>(field)] : nullptr;
  }
  // InvalidArgument when the field is there already.
  absl::Status Add(RecordField field, const RawValue& value);
  absl::Status AddNull(RecordField field);
  void Clear() { seen_ = present_ = 0; }

 private:
  static uint32_t Bit(RecordField field) { return uint32_t{1} << static_cast<int>(field); }

  std::array<RawValue, static_cast<int>(RecordField::kNumFields)> values_;
  uint32_t seen_ = 0;
  uint32_t present_ = 0;
};

// nullopt: the line needs the full parser. Otherwise OK, or InvalidArgument.
std::optional<absl::Status> ScanRecordFast(absl::string_view line, RawRecord& record);

// `scratch` holds the decoded text the record's views point into.
absl::Status ScanRecordFully(absl::string_view line, RawRecord& record, std::string& scratch);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_RECORD_SCANNER_H_
