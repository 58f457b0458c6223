#include "tables/observation_record.h"

#include <algorithm>
#include <memory>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"
#include "tables/table_kinds.h"
#include "tables/table_tensors.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxSeqLen = int64_t{1} << 24;
constexpr std::size_t kMaxNameBytes = 256;

absl::StatusOr<std::string> NameField(const Json& document, absl::string_view key,
                                      absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(std::string name, StringField(document, key, where));
  if (!name.empty() && name.size() <= kMaxNameBytes) return name;
  return FieldError(where, key, PreviewJson(name), absl::StrCat("1..", kMaxNameBytes, " bytes"));
}

absl::StatusOr<std::vector<LayerGroup>> ReadProtected(const Json& document, int64_t seq_len,
                                                      absl::string_view where) {
  std::vector<LayerGroup> ranges;
  const auto list = document.find("protected");
  if (list == document.end() || list->is_null()) return ranges;
  int64_t least = 0;
  for (const Json& one : *list) {
    const bool two = one.is_array() && one.size() == 2 && one[0].is_number_integer() &&
                     one[1].is_number_integer();
    const LayerGroup range =
        two ? LayerGroup{one[0].get<int64_t>(), one[1].get<int64_t>()} : LayerGroup{-1, -1};
    if (range.begin < least || range.end <= range.begin || range.end > seq_len) {
      return FieldError(where, "protected", PreviewJson(one),
                        absl::StrCat("[begin, end) ascending within ", least, "..", seq_len));
    }
    ranges.push_back(range);
    least = range.end;
  }
  return ranges;
}

absl::Status ReadCandidates(const SafetensorsFile& file, ObservationRecord& record) {
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* heads_info,
                           RequireTensor(file, "heads", TensorDType::kI32, 2));
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* rows_info,
                           RequireTensor(file, "rows", TensorDType::kI32, 1));
  const int64_t count = heads_info->shape[0];
  if (count < 1) {
    return FieldError(TensorWhere(file, "heads"), "shape", "[0, 2]", "at least one candidate");
  }
  KEEPSET_RETURN_IF_ERROR(RequireShape(file, *heads_info, {count, 2}, "(candidates; layer, head)"));
  KEEPSET_RETURN_IF_ERROR(RequireShape(file, *rows_info, {count}, "(candidates of heads)"));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> heads, ReadInts(file, *heads_info));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> rows, ReadInts(file, *rows_info));
  std::set<std::tuple<int64_t, int64_t, int64_t>> seen;
  for (int64_t i = 0; i < count; ++i) {
    const std::size_t index = i;
    KEEPSET_ASSIGN_OR_RETURN(
        const HeadObservation one,
        CheckedObservation(file, record.model, index, heads[2 * i], heads[2 * i + 1], rows[i], 1));
    if (!seen.emplace(heads[2 * i], heads[2 * i + 1], rows[i]).second) {
      return FieldError(TensorWhere(file, "heads"), absl::StrCat("row ", i),
                        absl::StrCat("[", one.layer, ", ", one.head, "]"), "each candidate once");
    }
    record.candidates.push_back(one);
  }
  return absl::OkStatus();
}

absl::Status ReadValues(const SafetensorsFile& file, ObservationRecord& record) {
  const auto count = static_cast<int64_t>(record.candidates.size());
  const TensorInfo* scores = file.Find("scores");
  if (scores == nullptr) {
    return FieldError(TensorWhere(file, "scores"), "shape", "(missing)", "[candidates, seq_len]");
  }
  KEEPSET_RETURN_IF_ERROR(
      RequireShape(file, *scores, {count, record.seq_len}, "(candidates, seq_len)"));
  KEEPSET_ASSIGN_OR_RETURN(record.scores, ReadFloats(file, *scores));
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* need,
                           RequireTensor(file, "need", TensorDType::kF32, 1));
  KEEPSET_RETURN_IF_ERROR(RequireShape(file, *need, {record.seq_len}, "(seq_len)"));
  KEEPSET_ASSIGN_OR_RETURN(record.need, ReadFloats(file, *need));
  const auto negative = [](float value) { return value < 0.0f; };
  if (std::any_of(record.need.begin(), record.need.end(), negative)) {
    return FieldError(TensorWhere(file, "need"), "an element", "negative", "at least 0");
  }
  for (int64_t i = 0; i < count; ++i) {
    if (record.candidates[i].rows == ObservedRows::kKeyNovelty) continue;
    const auto begin = record.scores.begin() + i * record.seq_len;
    if (std::any_of(begin, begin + record.seq_len, negative)) {
      return FieldError(TensorWhere(file, "scores"), absl::StrCat("row ", i), "negative",
                        "attention of at least 0");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ObservationRecord> ParseObservationRecord(const SafetensorsFile& file) {
  const std::string& where = file.label();
  const std::string* metadata = file.metadata("keepset");
  if (metadata == nullptr) {
    return FieldError(where, "__metadata__.keepset", "(missing)", "the record's JSON document");
  }
  KEEPSET_ASSIGN_OR_RETURN(const Json document,
                           ParseStrictJsonObject(*metadata, absl::StrCat(where, ": keepset")));
  KEEPSET_ASSIGN_OR_RETURN(const std::string format, StringField(document, "format", where));
  if (format != "keepset.observations") {
    return FieldError(where, "format", PreviewJson(format), "keepset.observations");
  }
  KEEPSET_RETURN_IF_ERROR(IntField(document, "format_version", 1, 1, where).status());
  ObservationRecord record;
  KEEPSET_ASSIGN_OR_RETURN(const Json model, ObjectField(document, "model", where));
  KEEPSET_ASSIGN_OR_RETURN(record.model,
                           ParseModelFingerprint(model.dump(), absl::StrCat(where, ": model")));
  KEEPSET_ASSIGN_OR_RETURN(record.prompt_id, NameField(document, "prompt_id", where));
  KEEPSET_ASSIGN_OR_RETURN(record.task, NameField(document, "task", where));
  KEEPSET_ASSIGN_OR_RETURN(record.seq_len, IntField(document, "seq_len", 1, kMaxSeqLen, where));
  KEEPSET_ASSIGN_OR_RETURN(record.protected_ranges, ReadProtected(document, record.seq_len, where));
  KEEPSET_ASSIGN_OR_RETURN(record.probe, ReadObservationProbe(document, where));
  KEEPSET_RETURN_IF_ERROR(ReadCandidates(file, record));
  KEEPSET_RETURN_IF_ERROR(ReadValues(file, record));
  record.digest = file.Digest();
  return record;
}

absl::StatusOr<ObservationRecord> ReadObservationRecord(const std::string& path) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file,
                           SafetensorsFile::Open(path, ReadMode::kCopy));
  return ParseObservationRecord(*file);
}

}  // namespace keepset::tables
