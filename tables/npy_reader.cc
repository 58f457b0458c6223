#include "tables/npy_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/file_bytes.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

constexpr absl::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kMaxHeaderBytes = 1 << 16;
constexpr std::size_t kMaxRank = 8;

struct NpyHeader {
  std::string descr;
  std::optional<bool> fortran_order;
  std::optional<std::vector<int64_t>> shape;
};

// The header is a Python dict literal of three known keys; this reads exactly that much Python.
class HeaderParser {
 public:
  explicit HeaderParser(absl::string_view text) : rest_(text) {}

  // False when the text is anything else.
  bool Parse(NpyHeader& header) {
    if (!Take('{')) return false;
    while (!Take('}')) {
      std::string key;
      if (!TakeString(key) || !Take(':')) return false;
      if (key == "descr" && header.descr.empty()) {
        if (!TakeString(header.descr)) return false;
      } else if (key == "fortran_order" && !header.fortran_order.has_value()) {
        if (!TakeBool(header.fortran_order)) return false;
      } else if (key == "shape" && !header.shape.has_value()) {
        if (!TakeShape(header.shape)) return false;
      } else {
        return false;
      }
      if (!Take(',') && !Peek('}')) return false;
    }
    SkipSpace();
    return rest_.empty() && !header.descr.empty() && header.fortran_order.has_value() &&
           header.shape.has_value();
  }

 private:
  void SkipSpace() { rest_ = absl::StripLeadingAsciiWhitespace(rest_); }
  bool Peek(char c) {
    SkipSpace();
    return !rest_.empty() && rest_.front() == c;
  }
  bool Take(char c) {
    if (!Peek(c)) return false;
    rest_.remove_prefix(1);
    return true;
  }
  bool TakeString(std::string& text) {
    if (!Peek('\'') && !Peek('"')) return false;
    const std::size_t end = rest_.find(rest_.front(), 1);
    if (end == absl::string_view::npos) return false;
    text = std::string(rest_.substr(1, end - 1));
    rest_.remove_prefix(end + 1);
    return true;
  }
  bool TakeBool(std::optional<bool>& value) {
    SkipSpace();
    for (const auto& [word, meaning] : {std::pair<absl::string_view, bool>("True", true),
                                        std::pair<absl::string_view, bool>("False", false)}) {
      if (rest_.substr(0, word.size()) != word) continue;
      rest_.remove_prefix(word.size());
      value = meaning;
      return true;
    }
    return false;
  }
  bool TakeShape(std::optional<std::vector<int64_t>>& shape) {
    if (!Take('(')) return false;
    shape.emplace();
    while (!Take(')')) {
      SkipSpace();
      const std::size_t digits =
          std::find_if_not(rest_.begin(), rest_.end(), absl::ascii_isdigit) - rest_.begin();
      int64_t dim = 0;
      if (digits == 0 || !absl::SimpleAtoi(rest_.substr(0, digits), &dim)) return false;
      shape->push_back(dim);
      rest_.remove_prefix(digits);
      if (!Take(',') && !Peek(')')) return false;
    }
    return shape->size() <= kMaxRank;
  }

  absl::string_view rest_;
};

// Calls visit(i, j) for every element: i its row-major index, j its index in column-major order.
template <typename Visit>
void ForEachFortranElement(const std::vector<int64_t>& shape, int64_t count, const Visit& visit) {
  std::vector<int64_t> position(shape.size(), 0);
  for (int64_t i = 0; i < count; ++i) {
    int64_t column_major = 0;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      column_major = column_major * shape[axis] + position[axis];
    }
    visit(i, column_major);
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      if (++position[axis] < shape[axis]) break;
      position[axis] = 0;
    }
  }
}

float LoadFloat(absl::Span<const std::byte> data, int64_t index, std::size_t element_bytes) {
  if (element_bytes == sizeof(float)) {
    float value;
    std::memcpy(&value, data.data() + index * sizeof(value), sizeof(value));
    return value;
  }
  double value;
  std::memcpy(&value, data.data() + index * sizeof(value), sizeof(value));
  return static_cast<float>(value);
}

// Splits off the header text; `data` is what lies behind it.
absl::StatusOr<absl::string_view> HeaderText(absl::Span<const std::byte> bytes,
                                             absl::string_view label,
                                             absl::Span<const std::byte>& data) {
  const absl::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.size() < 10 || text.substr(0, kMagic.size()) != kMagic) {
    return absl::InvalidArgumentError(absl::StrCat(label, ": not a .npy file, want one"));
  }
  const int version = static_cast<unsigned char>(text[6]);
  if (version < 1 || version > 3) {
    return FieldError(label, "npy_version", absl::StrCat(version), "1, 2 or 3");
  }
  const std::size_t length_bytes = version == 1 ? 2 : 4;
  const std::size_t header_begin = 8 + length_bytes;
  if (text.size() < header_begin) {
    return FieldError(label, "file_bytes", absl::StrCat(text.size()), "a whole .npy header");
  }
  std::size_t header_bytes = 0;
  for (std::size_t i = 0; i < length_bytes; ++i) {
    header_bytes |= static_cast<std::size_t>(bytes[8 + i]) << (8 * i);
  }
  const std::size_t largest = std::min(kMaxHeaderBytes, text.size() - header_begin);
  if (header_bytes > largest) {
    return FieldError(label, "header_bytes", absl::StrCat(header_bytes),
                      absl::StrCat("at most ", largest));
  }
  data = bytes.subspan(header_begin + header_bytes);
  return text.substr(header_begin, header_bytes);
}

}  // namespace

absl::StatusOr<NpyArray> ParseNpy(absl::Span<const std::byte> bytes, absl::string_view label) {
  absl::Span<const std::byte> data;
  KEEPSET_ASSIGN_OR_RETURN(const absl::string_view text, HeaderText(bytes, label, data));
  NpyHeader header;
  if (!HeaderParser(text).Parse(header)) {
    return FieldError(label, "header", absl::CHexEscape(text.substr(0, 80)),
                      "descr, fortran_order and shape of a plain array");
  }
  if (header.descr != "<f4" && header.descr != "<f8") {
    return FieldError(label, "descr", absl::CHexEscape(header.descr.substr(0, 40)),
                      "<f4 or <f8; object arrays are refused");
  }
  const std::size_t element_bytes = header.descr == "<f4" ? 4 : 8;
  int64_t wanted = static_cast<int64_t>(element_bytes);
  bool overflow = false;
  for (const int64_t dim : *header.shape) {
    overflow = overflow || __builtin_mul_overflow(wanted, dim, &wanted);
  }
  if (overflow || static_cast<uint64_t>(wanted) != data.size()) {
    return FieldError(label, "data_bytes", absl::StrCat(data.size()),
                      absl::StrCat(overflow ? "a smaller shape than [" : "the bytes of shape [",
                                   absl::StrJoin(*header.shape, ", "), "]"));
  }
  NpyArray array;
  array.shape = *header.shape;
  const int64_t count = wanted / static_cast<int64_t>(element_bytes);
  array.values.resize(count);
  if (*header.fortran_order) {
    ForEachFortranElement(array.shape, count, [&](int64_t row_major, int64_t column_major) {
      array.values[row_major] = LoadFloat(data, column_major, element_bytes);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) array.values[i] = LoadFloat(data, i, element_bytes);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(array.values[i])) {
      return FieldError(label, absl::StrCat("element[", i, "]"), absl::StrCat(array.values[i]),
                        "a finite number");
    }
  }
  return array;
}

absl::StatusOr<NpyArray> ReadNpy(const std::string& path) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<FileBytes> file,
                           FileBytes::Open(path, ReadMode::kCopy));
  return ParseNpy(file->bytes(), path);
}

}  // namespace keepset::tables
