#include <optional>
#include <set>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tables/safetensors.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

// JSON string literal, or nullopt when `text` is not UTF-8 (the one thing dump() throws for).
std::optional<std::string> Quoted(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    return std::nullopt;
  }
}

absl::Status CheckTensor(const TensorToWrite& tensor) {
  const std::string where = absl::StrCat("tensor ", absl::CHexEscape(tensor.name));
  int64_t bytes = TensorDTypeBytes(tensor.dtype);
  for (const int64_t dim : tensor.shape) {
    if (dim < 0 || __builtin_mul_overflow(bytes, dim, &bytes)) {
      return FieldError(where, "shape", absl::StrCat("[", absl::StrJoin(tensor.shape, ","), "]"),
                        "non-negative dimensions and a byte count below 2^63");
    }
  }
  if (bytes != static_cast<int64_t>(tensor.bytes.size())) {
    return FieldError(where, "bytes", absl::StrCat(tensor.bytes.size()),
                      absl::StrCat(bytes, " for shape [", absl::StrJoin(tensor.shape, ","), "]"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> SerializeSafetensors(const std::map<std::string, std::string>& metadata,
                                                 const std::vector<TensorToWrite>& tensors) {
  std::vector<std::string> entries;
  if (!metadata.empty()) {
    std::vector<std::string> pairs;
    for (const auto& [key, value] : metadata) {
      const std::optional<std::string> quoted_key = Quoted(key);
      const std::optional<std::string> quoted_value = Quoted(value);
      if (!quoted_key.has_value() || !quoted_value.has_value()) {
        return FieldError("__metadata__", absl::CHexEscape(key), "(not UTF-8)", "UTF-8 text");
      }
      pairs.push_back(absl::StrCat(*quoted_key, ":", *quoted_value));
    }
    entries.push_back(absl::StrCat("\"__metadata__\":{", absl::StrJoin(pairs, ","), "}"));
  }
  std::set<std::string> names;
  int64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    if (absl::Status status = CheckTensor(tensor); !status.ok()) return status;
    const std::optional<std::string> quoted_name = Quoted(tensor.name);
    if (tensor.name == "__metadata__" || !quoted_name.has_value() ||
        !names.insert(tensor.name).second) {
      return FieldError("tensors", "name", absl::CHexEscape(tensor.name),
                        "UTF-8, every name once and none of them __metadata__");
    }
    const int64_t end = offset + static_cast<int64_t>(tensor.bytes.size());
    entries.push_back(absl::StrCat(*quoted_name, ":{\"dtype\":\"", TensorDTypeName(tensor.dtype),
                                   "\",\"shape\":[", absl::StrJoin(tensor.shape, ","),
                                   "],\"data_offsets\":[", offset, ",", end, "]}"));
    offset = end;
  }
  std::string header = absl::StrCat("{", absl::StrJoin(entries, ","), "}");
  header.resize((header.size() + 7) / 8 * 8, ' ');

  std::string file;
  file.reserve(8 + header.size() + offset);
  for (int i = 0; i < 8; ++i) {
    file.push_back(static_cast<char>((static_cast<uint64_t>(header.size()) >> (8 * i)) & 0xff));
  }
  file += header;
  for (const TensorToWrite& tensor : tensors) {
    file.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  }
  return file;
}

}  // namespace keepset::tables
