// Bytes from outside (a client's strings, file names) as text that a protobuf `string` field, a
// JSON document and a log line take: valid UTF-8 of bounded length.
#ifndef KEEPSET_BASE_TEXT_H_
#define KEEPSET_BASE_TEXT_H_

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"

namespace keepset {

// The longest beginning of `text`, of at most `max_bytes`, that cuts no UTF-8 character.
absl::string_view CutText(absl::string_view text, size_t max_bytes);

// `bytes` where every byte that is no part of a UTF-8 character is written as \xNN.
std::string ToText(absl::string_view bytes);
// At most `max_bytes` of that.
std::string ToText(absl::string_view bytes, size_t max_bytes);

// ToText for a line on a terminal: also what ends a line, moves the cursor or turns the direction
// of writing (control characters, U+2028, U+2029, bidirectional controls) is written as \xNN, byte
// by byte.
std::string ToPrintable(absl::string_view bytes);

}  // namespace keepset

#endif  // KEEPSET_BASE_TEXT_H_
