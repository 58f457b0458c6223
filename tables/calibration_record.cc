#include "tables/calibration_record.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/numeric/int128.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/model_fingerprint.h"
#include "tables/record_scanner.h"

namespace keepset::tables {
namespace {

constexpr int64_t kMaxTokens = INT32_MAX;
// ln of any sequence length is far below; an entropy beyond is in another unit or damaged.
constexpr double kMaxEntropy = 1000;
constexpr std::size_t kMaxTextBytes = 1024;

absl::Status BadField(RecordField field, absl::string_view value, absl::string_view want) {
  return absl::InvalidArgumentError(
      absl::StrCat(RecordFieldName(field), "=", value, ", want ", want));
}

std::string TextOf(const RawValue* value) {
  if (value == nullptr) return "(missing)";
  const std::string text = absl::CHexEscape(value->text.substr(0, 80));
  return value->type == RawType::kString ? absl::StrCat("\"", text, "\"") : text;
}

// Reads typed fields of one record.
class FieldReader {
 public:
  explicit FieldReader(const RawRecord& raw) : raw_(raw) {}

  bool Has(RecordField field) const { return raw_.Find(field) != nullptr; }

  absl::Status Int(RecordField field, int64_t low, int64_t high, int64_t& out) const {
    const RawValue* value = raw_.Find(field);
    if (value == nullptr || value->type != RawType::kInteger || value->integer < low ||
        value->integer > high) {
      return BadField(field, TextOf(value), absl::StrCat("an integer in ", low, "..", high));
    }
    out = value->integer;
    return absl::OkStatus();
  }

  absl::Status Finite(RecordField field, absl::string_view want, double& out) const {
    const RawValue* value = raw_.Find(field);
    if (value == nullptr || (value->type != RawType::kInteger && value->type != RawType::kReal) ||
        !std::isfinite(value->real)) {
      return BadField(field, TextOf(value), want);
    }
    out = value->real;
    return absl::OkStatus();
  }

  absl::Status Text(RecordField field, absl::string_view want, absl::string_view& out) const {
    const RawValue* value = raw_.Find(field);
    if (value == nullptr || value->type != RawType::kString || value->text.empty() ||
        value->text.size() > kMaxTextBytes) {
      return BadField(field, TextOf(value), want);
    }
    out = value->text;
    return absl::OkStatus();
  }

  std::string Written(RecordField field) const { return TextOf(raw_.Find(field)); }

 private:
  const RawRecord& raw_;
};

int64_t Last(int64_t stated, int64_t limit) { return (stated > 0 ? stated : limit) - 1; }

absl::Status ReadKind(const FieldReader& fields, CalibrationRecord& record) {
  constexpr absl::string_view kWant = "\"head\" or \"gate\"";
  absl::string_view kind;
  KEEPSET_RETURN_IF_ERROR(fields.Text(RecordField::kKind, kWant, kind));
  if (kind != "head" && kind != "gate") {
    return BadField(RecordField::kKind, fields.Written(RecordField::kKind), kWant);
  }
  record.kind = kind == "head" ? RecordKind::kHead : RecordKind::kGate;
  return absl::OkStatus();
}

absl::Status ReadState(const FieldReader& fields, const RecordRules& rules,
                       CalibrationRecord& record) {
  KEEPSET_RETURN_IF_ERROR(fields.Int(RecordField::kBudget, 1, kMaxTokens, record.budget));
  KEEPSET_RETURN_IF_ERROR(
      fields.Int(RecordField::kLayer, 0, Last(rules.num_layers, kMaxModelLayers), record.layer));
  if (record.kind == RecordKind::kGate) {
    KEEPSET_RETURN_IF_ERROR(
        fields.Finite(RecordField::kEntropy, "a finite number of nats", record.entropy));
    if (record.entropy < 0 || record.entropy > kMaxEntropy) {
      return BadField(RecordField::kEntropy, fields.Written(RecordField::kEntropy),
                      absl::StrCat("nats in 0..", kMaxEntropy));
    }
    KEEPSET_RETURN_IF_ERROR(
        fields.Finite(RecordField::kPpl, "a finite number above 0", record.ppl));
    if (record.ppl <= 0 || record.ppl > std::numeric_limits<float>::max()) {
      return BadField(RecordField::kPpl, fields.Written(RecordField::kPpl),
                      "a number above 0 that fits 32-bit floats");
    }
    return absl::OkStatus();
  }
  if (!fields.Has(RecordField::kKvHead)) {
    return fields.Int(RecordField::kHead, 0, Last(rules.num_qo_heads, kMaxModelHeads), record.head);
  }
  if (fields.Has(RecordField::kHead)) {
    return BadField(RecordField::kKvHead, fields.Written(RecordField::kKvHead),
                    "either head or kv_head, not both");
  }
  record.head_unit = HeadUnit::kKvHead;
  return fields.Int(RecordField::kKvHead, 0, Last(rules.num_kv_heads, kMaxModelHeads), record.head);
}

absl::Status ReadAction(const FieldReader& fields, const ActionGrids& actions,
                        CalibrationRecord& record) {
  const ActionGrid& grid = record.kind == RecordKind::kHead ? actions.head : actions.gate;
  double action = 0;
  KEEPSET_RETURN_IF_ERROR(fields.Finite(RecordField::kAction, "a finite number", action));
  const std::optional<int> index = grid.IndexOf(action);
  if (!index.has_value()) {
    return BadField(RecordField::kAction, fields.Written(RecordField::kAction),
                    absl::StrCat("one of ", grid.first, "..", grid.Value(grid.size - 1),
                                 " in steps of ", grid.step, ", at most a quarter step off"));
  }
  record.action = *index;
  return absl::OkStatus();
}

// Head: -(compressed_loss - full_loss). Gate: that less the share of candidates beyond the budget,
// max(0, candidates - budget) / sequence_length.
absl::Status ReadReward(const FieldReader& fields, CalibrationRecord& record) {
  int64_t sequence_length = 0;
  KEEPSET_RETURN_IF_ERROR(fields.Int(RecordField::kSequenceLength, 1, kMaxTokens, sequence_length));
  double over_budget = 0;
  if (record.kind == RecordKind::kGate) {
    int64_t candidates = 0;
    KEEPSET_RETURN_IF_ERROR(
        fields.Int(RecordField::kCandidateCount, 0, sequence_length, candidates));
    over_budget = static_cast<double>(std::max<int64_t>(0, candidates - record.budget)) /
                  static_cast<double>(sequence_length);
  }
  const bool stated = fields.Has(RecordField::kReward);
  const bool losses_left_out =
      stated && !fields.Has(RecordField::kFullLoss) && !fields.Has(RecordField::kCompressedLoss);
  if (!losses_left_out) {
    constexpr absl::string_view kWant = "a finite loss in nats per token";
    double full = 0;
    double compressed = 0;
    KEEPSET_RETURN_IF_ERROR(fields.Finite(RecordField::kFullLoss, kWant, full));
    KEEPSET_RETURN_IF_ERROR(fields.Finite(RecordField::kCompressedLoss, kWant, compressed));
    record.reward = full - compressed - over_budget;
  }
  if (stated) {
    KEEPSET_RETURN_IF_ERROR(fields.Finite(RecordField::kReward, "a finite number", record.reward));
  }
  if (!(std::abs(record.reward) <= kMaxAbsReward)) {
    const RecordField field = stated ? RecordField::kReward : RecordField::kCompressedLoss;
    return BadField(field, fields.Written(field),
                    absl::StrCat("a reward within +-", kMaxAbsReward));
  }
  return absl::OkStatus();
}

absl::Status ReadOrigin(const FieldReader& fields, const RecordRules& rules,
                        CalibrationRecord& record) {
  KEEPSET_RETURN_IF_ERROR(
      fields.Text(RecordField::kPromptId, "text of 1..1024 bytes", record.prompt_id));
  if (fields.Has(RecordField::kSeed)) {
    KEEPSET_RETURN_IF_ERROR(fields.Int(RecordField::kSeed, std::numeric_limits<int64_t>::min(),
                                       std::numeric_limits<int64_t>::max(), record.seed));
  }
  if (rules.paired_policy == PairedPolicyRule::kOptional &&
      !fields.Has(RecordField::kPairedPolicy)) {
    return absl::OkStatus();
  }
  return fields.Text(RecordField::kPairedPolicy,
                     "the version of the frozen companion table, text of 1..1024 bytes",
                     record.paired_policy);
}

// Folds a 64-bit word into a running hash by the two halves of their product.
uint64_t Mix(uint64_t hash, uint64_t word) {
  const absl::uint128 product =
      absl::uint128(hash ^ word ^ 0x9e3779b97f4a7c15u) * absl::uint128(0xd6e8feb86659fd93u);
  const uint64_t folded = absl::Uint128Low64(product) ^ absl::Uint128High64(product);
  // A state whose product vanishes would forget what came before.
  return folded ^ (hash << 23 | hash >> 41) ^ word;
}

uint64_t MixText(uint64_t hash, absl::string_view text) {
  hash = Mix(hash, text.size());
  while (!text.empty()) {
    // Bytes in little-endian order whatever the platform.
    uint64_t word = 0;
    const std::size_t count = std::min<std::size_t>(text.size(), sizeof(word));
    for (std::size_t i = 0; i < count; ++i) {
      word |= static_cast<uint64_t>(static_cast<unsigned char>(text[i])) << (8 * i);
    }
    hash = Mix(hash, word);
    text.remove_prefix(count);
  }
  return hash;
}

}  // namespace

std::optional<int> ActionGrid::IndexOf(double action) const {
  const double steps = (action - first) / step;
  if (!(steps > -1 && steps < size)) return std::nullopt;
  const int index = std::clamp(static_cast<int>(std::lround(steps)), 0, size - 1);
  // The slack covers the rounding of grid values written as 32-bit floats.
  constexpr double kQuarterStep = 0.25 + 1e-5;
  if (std::abs(steps - index) > kQuarterStep) return std::nullopt;
  return index;
}

absl::Status CheckActionGrid(absl::string_view name, const ActionGrid& grid) {
  constexpr double kLargestAction = 1000;
  const double last = grid.first + grid.step * (grid.size - 1);
  if (grid.size >= 2 && grid.size <= kMaxActions && grid.first > 0 && grid.step > 0 &&
      last <= kLargestAction) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      name, "=", grid.first, ":", grid.step, ":", grid.size,
      ", want first above 0, step above 0, 2..", kMaxActions, " values up to ", kLargestAction));
}

absl::StatusOr<CalibrationRecord> ParseCalibrationRecord(absl::string_view line,
                                                         const RecordRules& rules,
                                                         std::string& scratch) {
  RawRecord raw;
  const std::optional<absl::Status> scanned = ScanRecordFast(line, raw);
  KEEPSET_RETURN_IF_ERROR(scanned.has_value() ? *scanned : ScanRecordFully(line, raw, scratch));
  const FieldReader fields(raw);
  CalibrationRecord record;
  KEEPSET_RETURN_IF_ERROR(ReadKind(fields, record));
  KEEPSET_RETURN_IF_ERROR(ReadOrigin(fields, rules, record));
  KEEPSET_RETURN_IF_ERROR(ReadState(fields, rules, record));
  KEEPSET_RETURN_IF_ERROR(ReadAction(fields, rules.actions, record));
  KEEPSET_RETURN_IF_ERROR(ReadReward(fields, record));
  return record;
}

uint64_t RecordIdentity(const CalibrationRecord& record) {
  uint64_t hash =
      Mix(static_cast<uint64_t>(record.kind) << 8 | static_cast<uint64_t>(record.head_unit),
          static_cast<uint64_t>(record.seed));
  hash = Mix(hash, static_cast<uint64_t>(record.budget));
  hash = Mix(hash, static_cast<uint64_t>(record.layer) << 40 |
                       static_cast<uint64_t>(record.head) << 20 |
                       static_cast<uint64_t>(record.action));
  hash = MixText(hash, record.prompt_id);
  return MixText(hash, record.paired_policy);
}

}  // namespace keepset::tables
