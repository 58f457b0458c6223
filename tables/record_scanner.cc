#include "tables/record_scanner.h"

#include <algorithm>
#include <charconv>
#include <iterator>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

constexpr absl::string_view kFieldNames[] = {"kind",
                                             "prompt_id",
                                             "seed",
                                             "budget",
                                             "layer",
                                             "head",
                                             "kv_head",
                                             "action",
                                             "full_loss",
                                             "compressed_loss",
                                             "loss",
                                             "reward",
                                             "sequence_length",
                                             "candidate_count",
                                             "entropy",
                                             "ppl",
                                             "paired_policy"};
static_assert(std::size(kFieldNames) == static_cast<int>(RecordField::kNumFields));

std::optional<RecordField> FieldOf(absl::string_view key) {
  const auto is = [key](RecordField field) -> std::optional<RecordField> {
    if (key == RecordFieldName(field)) return field;
    return std::nullopt;
  };
  const auto either = [&is](RecordField a, RecordField b) {
    const std::optional<RecordField> first = is(a);
    return first.has_value() ? first : is(b);
  };
  switch (key.size()) {
    case 3:
      return is(RecordField::kPpl);
    case 4:
      if (key[0] == 'k') return is(RecordField::kKind);
      if (key[0] == 'h') return is(RecordField::kHead);
      return either(RecordField::kLoss, RecordField::kSeed);
    case 5:
      return is(RecordField::kLayer);
    case 6:
      if (key[0] == 'b') return is(RecordField::kBudget);
      return either(RecordField::kAction, RecordField::kReward);
    case 7:
      return either(RecordField::kEntropy, RecordField::kKvHead);
    case 9:
      return either(RecordField::kPromptId, RecordField::kFullLoss);
    case 13:
      return is(RecordField::kPairedPolicy);
    case 15:
      if (key[0] == 's') return is(RecordField::kSequenceLength);
      return either(RecordField::kCompressedLoss, RecordField::kCandidateCount);
    default:
      return std::nullopt;
  }
}

std::optional<RecordField> LossPartOf(absl::string_view key) {
  if (key == "full") return RecordField::kFullLoss;
  if (key == "compressed") return RecordField::kCompressedLoss;
  return std::nullopt;
}

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// Which keys of an object mean something.
enum class Scope { kRecord, kLoss, kIgnored };

// Reads one line. A method that returns false has set `error_`, or `unsure_` when the full parser
// must decide.
class LineScanner {
 public:
  LineScanner(absl::string_view line, RawRecord& record)
      : at_(line.data()), end_(line.data() + line.size()), begin_(at_), record_(record) {}

  std::optional<absl::Status> Scan() {
    SkipSpace();
    if (Object(Scope::kRecord, 0)) {
      SkipSpace();
      if (at_ == end_) return absl::OkStatus();
      Fail("the end of the line");
    }
    if (unsure_) return std::nullopt;
    return error_;
  }

 private:
  bool Fail(absl::string_view want) {
    const std::size_t rest = std::min<std::size_t>(end_ - at_, 20);
    error_ = absl::InvalidArgumentError(
        absl::StrCat("not JSON at column ", at_ - begin_ + 1, ": \"",
                     absl::CHexEscape(absl::string_view(at_, rest)), "\", want ", want));
    return false;
  }
  bool Unsure() {
    unsure_ = true;
    return false;
  }
  void SkipSpace() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  bool Take(char c) {
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }
  bool Literal(absl::string_view word) {
    if (absl::string_view(at_, end_ - at_).substr(0, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  // Printable ASCII without escapes.
  bool String(absl::string_view& text) {
    if (!Take('"')) return Fail("a string");
    const char* first = at_;
    for (; at_ != end_; ++at_) {
      const auto c = static_cast<unsigned char>(*at_);
      if (c == '"') {
        text = absl::string_view(first, at_ - first);
        ++at_;
        return true;
      }
      if (c == '\\' || c < 0x20 || c >= 0x80) return Unsure();
    }
    return Fail("the end of a string");
  }

  bool Number(RawValue& value) {
    const char* first = at_;
    bool integer = true;
    Take('-');
    if (!Take('0')) {
      if (at_ == end_ || !IsDigit(*at_)) return Fail("a value");
      while (at_ != end_ && IsDigit(*at_)) ++at_;
    }
    if (Take('.')) {
      integer = false;
      if (at_ == end_ || !IsDigit(*at_)) return Fail("a digit");
      while (at_ != end_ && IsDigit(*at_)) ++at_;
    }
    if (at_ != end_ && (*at_ == 'e' || *at_ == 'E')) {
      integer = false;
      ++at_;
      if (!Take('+')) Take('-');
      if (at_ == end_ || !IsDigit(*at_)) return Fail("a digit");
      while (at_ != end_ && IsDigit(*at_)) ++at_;
    }
    value.text = absl::string_view(first, at_ - first);
    if (integer) {
      value.type = RawType::kInteger;
      if (std::from_chars(first, at_, value.integer).ec != std::errc()) return Unsure();
      value.real = static_cast<double>(value.integer);
      return true;
    }
    value.type = RawType::kReal;
    if (std::from_chars(first, at_, value.real).ec != std::errc()) return Unsure();
    return true;
  }

  // What json.dumps of Python writes for a number that is none.
  bool NotFinite(RawValue& value) {
    const char* first = at_;
    if (!Literal("NaN") && !Literal("Infinity") && !Literal("-Infinity")) return false;
    value.type = RawType::kNotFinite;
    value.text = absl::string_view(first, at_ - first);
    return true;
  }

  bool Add(RecordField field, const RawValue& value) {
    error_ = record_.Add(field, value);
    return error_.ok();
  }

  bool FieldValue(RecordField field) {
    RawValue value;
    const char* first = at_;
    if (Literal("null")) {
      error_ = record_.AddNull(field);
      return error_.ok();
    }
    if (at_ == end_) return Fail("a value");
    if (*at_ == '"') {
      value.type = RawType::kString;
      return String(value.text) && Add(field, value);
    }
    if (*at_ == '{' || *at_ == '[' || *at_ == 't' || *at_ == 'f') {
      const Scope scope = field == RecordField::kLoss ? Scope::kLoss : Scope::kIgnored;
      const bool is_object = *at_ == '{';
      if (!(is_object ? Object(scope, 1) : AnyValue(1))) return false;
      if (field == RecordField::kLoss && is_object) {
        error_ = record_.AddNull(field);
        return error_.ok();
      }
      value.text = absl::string_view(first, at_ - first);
      return Add(field, value);
    }
    return (NotFinite(value) || Number(value)) && Add(field, value);
  }

  bool AnyValue(int depth) {
    if (depth > kMaxJsonDepth) return Unsure();
    if (at_ == end_) return Fail("a value");
    absl::string_view text;
    RawValue value;
    switch (*at_) {
      case '"':
        return String(text);
      case '{':
        return Object(Scope::kIgnored, depth);
      case '[':
        return Array(depth);
      case 't':
        return Literal("true") || Fail("true");
      case 'f':
        return Literal("false") || Fail("false");
      case 'n':
        return Literal("null") || Fail("null");
      default:
        return Number(value);
    }
  }

  bool Array(int depth) {
    Take('[');
    SkipSpace();
    if (Take(']')) return true;
    while (true) {
      SkipSpace();
      if (!AnyValue(depth + 1)) return false;
      SkipSpace();
      if (Take(']')) return true;
      if (!Take(',')) return Fail("',' or ']'");
    }
  }

  bool Object(Scope scope, int depth) {
    if (!Take('{')) return Fail("a JSON object");
    SkipSpace();
    if (Take('}')) return true;
    while (true) {
      SkipSpace();
      absl::string_view key;
      if (!String(key)) return false;
      SkipSpace();
      if (!Take(':')) return Fail("':'");
      SkipSpace();
      const std::optional<RecordField> field = scope == Scope::kRecord ? FieldOf(key)
                                               : scope == Scope::kLoss ? LossPartOf(key)
                                                                       : std::nullopt;
      if (!(field.has_value() ? FieldValue(*field) : AnyValue(depth + 1))) return false;
      SkipSpace();
      if (Take('}')) return true;
      if (!Take(',')) return Fail("',' or '}'");
    }
  }

  const char* at_;
  const char* const end_;
  const char* const begin_;
  RawRecord& record_;
  absl::Status error_;
  bool unsure_ = false;
};

// Appends text that outlives the parsed document. `scratch` never grows beyond what was reserved,
// so earlier views stay valid.
absl::string_view Keep(absl::string_view text, std::string& scratch) {
  const std::size_t begin = scratch.size();
  scratch.append(text.data(), text.size());
  return absl::string_view(scratch).substr(begin);
}

RawValue ValueOf(const nlohmann::json& json, std::string& scratch) {
  RawValue value;
  if (json.is_string()) {
    value.type = RawType::kString;
    value.text = Keep(json.get_ref<const std::string&>(), scratch);
    return value;
  }
  const bool fits = !json.is_number_unsigned() || json.get<uint64_t>() <= INT64_MAX;
  if (json.is_number_integer() && fits) {
    value.type = RawType::kInteger;
    value.integer = json.get<int64_t>();
    value.real = static_cast<double>(value.integer);
  } else if (json.is_number()) {
    value.type = RawType::kReal;
    value.real = json.get<double>();
  }
  value.text = Keep(PreviewJson(json), scratch);
  return value;
}

absl::Status AddJson(RecordField field, const nlohmann::json& json, RawRecord& record,
                     std::string& scratch) {
  return json.is_null() ? record.AddNull(field) : record.Add(field, ValueOf(json, scratch));
}

}  // namespace

absl::string_view RecordFieldName(RecordField field) {
  return kFieldNames[static_cast<int>(field)];
}

absl::Status RawRecord::Add(RecordField field, const RawValue& value) {
  KEEPSET_RETURN_IF_ERROR(AddNull(field));
  present_ |= Bit(field);
  values_[static_cast<int>(field)] = value;
  return absl::OkStatus();
}

absl::Status RawRecord::AddNull(RecordField field) {
  if ((seen_ & Bit(field)) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(RecordFieldName(field), " is given twice, want it once"));
  }
  seen_ |= Bit(field);
  return absl::OkStatus();
}

std::optional<absl::Status> ScanRecordFast(absl::string_view line, RawRecord& record) {
  record.Clear();
  return LineScanner(line, record).Scan();
}

absl::Status ScanRecordFully(absl::string_view line, RawRecord& record, std::string& scratch) {
  record.Clear();
  absl::StatusOr<nlohmann::json> document = ParseStrictJsonObject(line, "record");
  if (!document.ok()) return document.status();
  scratch.clear();
  // A previewed value is at most about as long as a line, and there are few fields.
  scratch.reserve(line.size() + 128 * static_cast<std::size_t>(RecordField::kNumFields));
  for (const auto& [key, value] : document->items()) {
    const std::optional<RecordField> field = FieldOf(key);
    if (!field.has_value()) continue;
    if (*field == RecordField::kLoss && value.is_object()) {
      for (const auto& [part, loss] : value.items()) {
        const std::optional<RecordField> loss_field = LossPartOf(part);
        if (!loss_field.has_value()) continue;
        KEEPSET_RETURN_IF_ERROR(AddJson(*loss_field, loss, record, scratch));
      }
      continue;
    }
    KEEPSET_RETURN_IF_ERROR(AddJson(*field, value, record, scratch));
  }
  return absl::OkStatus();
}

}  // namespace keepset::tables
