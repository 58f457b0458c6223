#include <openssl/evp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "tables/file_bytes.h"
#include "tables/safetensors.h"
#include "tables/strict_json.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct DTypeEntry {
  TensorDType dtype;
  absl::string_view name;
  int64_t bytes;
};
constexpr DTypeEntry kDTypes[] = {
    {TensorDType::kF64, "F64", 8},        {TensorDType::kF32, "F32", 4},
    {TensorDType::kF16, "F16", 2},        {TensorDType::kBF16, "BF16", 2},
    {TensorDType::kI64, "I64", 8},        {TensorDType::kI32, "I32", 4},
    {TensorDType::kI16, "I16", 2},        {TensorDType::kI8, "I8", 1},
    {TensorDType::kU64, "U64", 8},        {TensorDType::kU32, "U32", 4},
    {TensorDType::kU16, "U16", 2},        {TensorDType::kU8, "U8", 1},
    {TensorDType::kF8E4M3, "F8_E4M3", 1}, {TensorDType::kF8E5M2, "F8_E5M2", 1},
    {TensorDType::kBool, "BOOL", 1},
};

const DTypeEntry& Entry(TensorDType dtype) {
  const auto* entry = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                   [dtype](const DTypeEntry& e) { return e.dtype == dtype; });
  KEEPSET_CHECK(entry != std::end(kDTypes));
  return *entry;
}

// A tensor as its header entry states it, offsets relative to the first byte behind the header.
struct Declared {
  TensorInfo info;
  uint64_t begin = 0;
  uint64_t end = 0;
};

absl::StatusOr<TensorDType> ParseDType(const Json& entry, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string name, StringField(entry, "dtype", where));
  for (const DTypeEntry& known : kDTypes) {
    if (known.name == name) return known.dtype;
  }
  std::vector<absl::string_view> names;
  for (const DTypeEntry& known : kDTypes) names.push_back(known.name);
  return FieldError(where, "dtype", absl::CHexEscape(name.substr(0, 40)),
                    absl::StrCat("one of ", absl::StrJoin(names, ", ")));
}

absl::StatusOr<std::vector<int64_t>> ParseCounts(const Json& entry, absl::string_view key,
                                                 absl::string_view where) {
  const auto it = entry.find(std::string(key));
  std::vector<int64_t> counts;
  bool valid = it != entry.end() && it->is_array();
  if (valid) {
    for (const Json& value : *it) {
      // A non-negative JSON integer is held unsigned; signed ones are negative.
      valid = valid && value.is_number_unsigned() && value.get<uint64_t>() <= INT64_MAX;
      if (valid) counts.push_back(value.get<int64_t>());
    }
  }
  if (!valid) {
    return FieldError(where, key, it == entry.end() ? "(missing)" : PreviewJson(*it),
                      "a list of non-negative integers");
  }
  return counts;
}

absl::StatusOr<Declared> ParseEntry(absl::string_view name, const Json& entry,
                                    absl::string_view where) {
  if (!entry.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": ", PreviewJson(entry), ", want an object"));
  }
  Declared tensor;
  tensor.info.name = std::string(name);
  KEEPSET_ASSIGN_OR_RETURN(tensor.info.dtype, ParseDType(entry, where));
  KEEPSET_ASSIGN_OR_RETURN(tensor.info.shape, ParseCounts(entry, "shape", where));
  int64_t elements = 1;
  int64_t bytes = 0;
  bool overflow = false;
  for (const int64_t dim : tensor.info.shape) {
    overflow = overflow || __builtin_mul_overflow(elements, dim, &elements);
  }
  overflow =
      overflow || __builtin_mul_overflow(elements, TensorDTypeBytes(tensor.info.dtype), &bytes);
  if (overflow) {
    return FieldError(where, "shape", PreviewJson(entry["shape"]), "a byte count below 2^63");
  }
  tensor.info.num_elements = elements;
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> offsets,
                           ParseCounts(entry, "data_offsets", where));
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] - offsets[0] != bytes) {
    return FieldError(
        where, "data_offsets", PreviewJson(entry["data_offsets"]),
        absl::StrCat("[begin, begin + ", bytes, "] for ", TensorDTypeName(tensor.info.dtype),
                     " of shape ", PreviewJson(entry["shape"])));
  }
  tensor.begin = offsets[0];
  tensor.end = offsets[1];
  return tensor;
}

class ParsedFile final : public SafetensorsFile {
 public:
  ParsedFile(std::unique_ptr<FileBytes> file, absl::string_view label)
      : file_(std::move(file)), label_(label) {}

  // Checks everything; the object is of no use unless this returned OK.
  absl::Status ParseHeader();

  const std::string& label() const override { return label_; }
  const std::string* metadata(absl::string_view key) const override {
    const auto it = metadata_.find(key);
    return it == metadata_.end() ? nullptr : &it->second;
  }
  const std::map<std::string, std::string, std::less<>>& all_metadata() const override {
    return metadata_;
  }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  const TensorInfo* Find(absl::string_view name) const override {
    const auto it = index_.find(name);
    return it == index_.end() ? nullptr : &tensors_[it->second];
  }
  std::string Digest() const override { return FileDigest(file_->bytes()); }
  absl::Span<const std::byte> bytes() const override { return file_->bytes(); }
  void ReleasePages() const override { file_->ReleasePages(); }

 private:
  absl::Status ParseMetadata(const Json& metadata);
  absl::Status PlaceTensors(std::vector<Declared> declared, absl::Span<const std::byte> data);

  const std::unique_ptr<FileBytes> file_;
  const std::string label_;
  std::map<std::string, std::string, std::less<>> metadata_;
  std::vector<TensorInfo> tensors_;  // in file order
  absl::flat_hash_map<std::string, std::size_t> index_;
};

absl::Status ParsedFile::ParseHeader() {
  const absl::Span<const std::byte> bytes = file_->bytes();
  if (bytes.size() < kLengthBytes) {
    return FieldError(label_, "file_bytes", absl::StrCat(bytes.size()),
                      "a safetensors file (8-byte header length first)");
  }
  uint64_t header_bytes = 0;
  for (int i = 0; i < 8; ++i) header_bytes |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  const uint64_t rest = bytes.size() - kLengthBytes;
  if (header_bytes > kMaxHeaderBytes || header_bytes > rest) {
    return FieldError(label_, "header_bytes", absl::StrCat(header_bytes),
                      absl::StrCat("at most ", std::min(kMaxHeaderBytes, rest)));
  }
  const absl::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                               header_bytes);
  const std::string where = absl::StrCat(label_, ": header");
  if (text.empty() || text.front() != '{') {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": does not begin with '{', want a safetensors JSON header"));
  }
  KEEPSET_ASSIGN_OR_RETURN(const Json header, ParseStrictJsonObject(text, where));
  std::vector<Declared> declared;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      KEEPSET_RETURN_IF_ERROR(ParseMetadata(entry));
      continue;
    }
    const std::string tensor_where =
        absl::StrCat(label_, ": tensor ", absl::CHexEscape(name.substr(0, 80)));
    KEEPSET_ASSIGN_OR_RETURN(Declared tensor, ParseEntry(name, entry, tensor_where));
    declared.push_back(std::move(tensor));
  }
  return PlaceTensors(std::move(declared), bytes.subspan(kLengthBytes + header_bytes));
}

absl::Status ParsedFile::ParseMetadata(const Json& metadata) {
  if (!metadata.is_object()) {
    return FieldError(label_, "__metadata__", PreviewJson(metadata), "strings by name");
  }
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return FieldError(label_, absl::StrCat("__metadata__.", absl::CHexEscape(key.substr(0, 80))),
                        PreviewJson(value), "a string");
    }
    metadata_.emplace(key, value.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status ParsedFile::PlaceTensors(std::vector<Declared> declared,
                                      absl::Span<const std::byte> data) {
  // In file order each tensor must begin where the one before it ended: neither overlap nor hole.
  std::sort(declared.begin(), declared.end(), [](const Declared& a, const Declared& b) {
    return std::tie(a.begin, a.end, a.info.name) < std::tie(b.begin, b.end, b.info.name);
  });
  uint64_t cursor = 0;
  for (Declared& tensor : declared) {
    const std::string where =
        absl::StrCat(label_, ": tensor ", absl::CHexEscape(tensor.info.name.substr(0, 80)));
    if (tensor.begin != cursor) {
      return FieldError(
          where, "data_offsets[0]", absl::StrCat(tensor.begin),
          absl::StrCat(cursor, tensor.begin < cursor ? " (tensors overlap)" : " (no holes)"));
    }
    if (tensor.end > data.size()) {
      return FieldError(where, "data_offsets[1]", absl::StrCat(tensor.end),
                        absl::StrCat("at most ", data.size(), ", the bytes behind the header"));
    }
    cursor = tensor.end;
    tensor.info.bytes = data.subspan(tensor.begin, tensor.end - tensor.begin);
    index_.emplace(tensor.info.name, tensors_.size());
    tensors_.push_back(std::move(tensor.info));
  }
  if (cursor != data.size()) {
    return FieldError(label_, "data_bytes", absl::StrCat(data.size()),
                      absl::StrCat(cursor, " (no bytes behind the last tensor)"));
  }
  return absl::OkStatus();
}

float WidenHalf(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  uint32_t wide = 0;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  wide = exponent == 31 ? (sign | 0x7f800000u | (mantissa << 13))
                        : (sign | ((exponent + 112) << 23) | (mantissa << 13));
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

float WidenBFloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Tensor data may be unaligned, so elements are copied out.
template <typename T>
T LoadElement(const TensorInfo& tensor, int64_t i) {
  T value;
  std::memcpy(&value, tensor.bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

std::string TensorWhere(const SafetensorsFile& file, const TensorInfo& tensor) {
  return absl::StrCat(file.label(), ": tensor ", absl::CHexEscape(tensor.name.substr(0, 80)));
}

absl::Status NotFinite(const SafetensorsFile& file, const TensorInfo& tensor, int64_t element,
                       float value) {
  return FieldError(TensorWhere(file, tensor), absl::StrCat("element[", element, "]"),
                    absl::StrCat(value), "a finite number");
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> Checked(std::unique_ptr<FileBytes> bytes,
                                                         absl::string_view label) {
  auto file = std::make_unique<ParsedFile>(std::move(bytes), label);
  KEEPSET_RETURN_IF_ERROR(file->ParseHeader());
  return file;
}

}  // namespace

int64_t TensorDTypeBytes(TensorDType dtype) { return Entry(dtype).bytes; }

absl::string_view TensorDTypeName(TensorDType dtype) { return Entry(dtype).name; }

std::string FileDigest(absl::Span<const std::byte> bytes) {
  unsigned char hash[EVP_MAX_MD_SIZE];
  unsigned int hash_bytes = 0;
  KEEPSET_CHECK(EVP_Digest(bytes.data(), bytes.size(), hash, &hash_bytes, EVP_sha256(), nullptr) ==
                1);
  return absl::StrCat("sha256:", absl::BytesToHexString(absl::string_view(
                                     reinterpret_cast<const char*>(hash), hash_bytes)));
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path,
                                                                       ReadMode mode) {
  KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<FileBytes> bytes, FileBytes::Open(path, mode));
  return Checked(std::move(bytes), path);
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Parse(
    absl::Span<const std::byte> bytes, absl::string_view label) {
  return Checked(FileBytes::CopyOf(bytes), label);
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::ParseOwned(
    std::string bytes, absl::string_view label) {
  return Checked(FileBytes::Own(std::move(bytes)), label);
}

absl::StatusOr<FloatTensor> ViewFloats(const SafetensorsFile& file, const TensorInfo& tensor) {
  static_assert(std::endian::native == std::endian::little, "tensors are little-endian");
  const auto* first = reinterpret_cast<const float*>(tensor.bytes.data());
  FloatTensor view;
  if (tensor.dtype != TensorDType::kF32 ||
      reinterpret_cast<std::uintptr_t>(first) % alignof(float) != 0) {
    KEEPSET_ASSIGN_OR_RETURN(view.copy, ReadFloats(file, tensor));
    view.values = view.copy;
    return view;
  }
  view.values = absl::MakeConstSpan(first, tensor.num_elements);
  for (int64_t i = 0; i < tensor.num_elements; ++i) {
    if (!std::isfinite(view.values[i])) return NotFinite(file, tensor, i, view.values[i]);
  }
  return view;
}

absl::StatusOr<std::vector<float>> ReadFloats(const SafetensorsFile& file,
                                              const TensorInfo& tensor) {
  std::vector<float> values(tensor.num_elements);
  for (int64_t i = 0; i < tensor.num_elements; ++i) {
    switch (tensor.dtype) {
      case TensorDType::kF32:
        values[i] = LoadElement<float>(tensor, i);
        break;
      case TensorDType::kF16:
        values[i] = WidenHalf(LoadElement<uint16_t>(tensor, i));
        break;
      case TensorDType::kBF16:
        values[i] = WidenBFloat16(LoadElement<uint16_t>(tensor, i));
        break;
      default:
        return FieldError(TensorWhere(file, tensor), "dtype", TensorDTypeName(tensor.dtype),
                          "F32, F16 or BF16");
    }
    if (!std::isfinite(values[i])) return NotFinite(file, tensor, i, values[i]);
  }
  return values;
}

absl::StatusOr<std::vector<int64_t>> ReadInts(const SafetensorsFile& file,
                                              const TensorInfo& tensor) {
  if (tensor.dtype != TensorDType::kI32 && tensor.dtype != TensorDType::kI64) {
    return FieldError(TensorWhere(file, tensor), "dtype", TensorDTypeName(tensor.dtype),
                      "I32 or I64");
  }
  std::vector<int64_t> values(tensor.num_elements);
  for (int64_t i = 0; i < tensor.num_elements; ++i) {
    values[i] = tensor.dtype == TensorDType::kI32 ? LoadElement<int32_t>(tensor, i)
                                                  : LoadElement<int64_t>(tensor, i);
  }
  return values;
}

}  // namespace keepset::tables
