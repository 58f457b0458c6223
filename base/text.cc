#include "base/text.h"

#include <cstdint>

#include "absl/strings/str_format.h"

namespace keepset {
namespace {

constexpr size_t kMaxCharacterBytes = 4;

bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

// Bytes of the character that `text` begins with; 0 when these bytes are none. Overlong forms,
// surrogates and what lies beyond U+10FFFF are none (RFC 3629).
size_t CharacterBytes(absl::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() < length) return 0;
  uint32_t code = lead & (0x7fu >> length);
  for (size_t i = 1; i < length; ++i) {
    if (!IsContinuation(text[i])) return 0;
    code = code << 6 | (static_cast<unsigned char>(text[i]) & 0x3fu);
  }
  if (length == 3 && (code < 0x800 || (code >= 0xd800 && code <= 0xdfff))) return 0;
  if (length == 4 && (code < 0x10000 || code > 0x10ffff)) return 0;
  return length;
}

// Of one UTF-8 character.
bool IsPrintable(absl::string_view character) {
  const auto byte = [character](size_t i) { return static_cast<unsigned char>(character[i]); };
  switch (character.size()) {
    case 1:
      return byte(0) >= 0x20 && byte(0) != 0x7f;
    case 2:  // U+0080..U+009F, U+061C
      return !(byte(0) == 0xc2 && byte(1) < 0xa0) && character != "\xd8\x9c";
    case 3: {
      const bool marks = character == "\xe2\x80\x8e" || character == "\xe2\x80\x8f";
      // U+2028..U+202E, U+2066..U+2069
      const bool lines = byte(0) == 0xe2 && byte(1) == 0x80 && byte(2) >= 0xa8 && byte(2) <= 0xae;
      const bool isolates =
          byte(0) == 0xe2 && byte(1) == 0x81 && byte(2) >= 0xa6 && byte(2) <= 0xa9;
      return !marks && !lines && !isolates;
    }
    default:
      return true;
  }
}

}  // namespace

absl::string_view CutText(absl::string_view text, size_t max_bytes) {
  if (text.size() <= max_bytes) return text;
  for (size_t end = max_bytes; end > 0 && max_bytes - end < kMaxCharacterBytes; --end) {
    if (!IsContinuation(text[end])) return text.substr(0, end);
  }
  // A character of fewer bytes than the limit would have been found: this is no UTF-8.
  return text.substr(0, max_bytes < kMaxCharacterBytes ? 0 : max_bytes);
}

std::string ToText(absl::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  while (!bytes.empty()) {
    const size_t length = CharacterBytes(bytes);
    if (length == 0) {
      absl::StrAppendFormat(&out, "\\x%02x", static_cast<unsigned char>(bytes[0]));
      bytes.remove_prefix(1);
    } else {
      out.append(bytes.data(), length);
      bytes.remove_prefix(length);
    }
  }
  return out;
}

std::string ToText(absl::string_view bytes, size_t max_bytes) {
  std::string text = ToText(CutText(bytes, max_bytes));
  text.resize(CutText(text, max_bytes).size());
  return text;
}

std::string ToPrintable(absl::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  while (!bytes.empty()) {
    const size_t length = CharacterBytes(bytes);
    const absl::string_view character = bytes.substr(0, length == 0 ? 1 : length);
    if (length > 0 && IsPrintable(character)) {
      out.append(character.data(), character.size());
    } else {
      for (const char c : character) {
        absl::StrAppendFormat(&out, "\\x%02x", static_cast<unsigned char>(c));
      }
    }
    bytes.remove_prefix(character.size());
  }
  return out;
}

}  // namespace keepset
