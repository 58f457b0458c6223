#include "service/registry/version_order.h"

#include <algorithm>
#include <cstddef>

#include "absl/strings/ascii.h"

namespace keepset::service {
namespace {

// The run of digits at the front, taken off `text`.
absl::string_view TakeDigits(absl::string_view& text) {
  const auto* end =
      std::find_if_not(text.begin(), text.end(), [](char c) { return absl::ascii_isdigit(c); });
  const absl::string_view digits = text.substr(0, end - text.begin());
  text.remove_prefix(digits.size());
  return digits;
}

absl::string_view WithoutZeros(absl::string_view digits) {
  const size_t first = digits.find_first_not_of('0');
  return first == absl::string_view::npos ? absl::string_view() : digits.substr(first);
}

int Compare(absl::string_view a, absl::string_view b) {
  while (!a.empty() && !b.empty()) {
    if (absl::ascii_isdigit(a[0]) && absl::ascii_isdigit(b[0])) {
      const absl::string_view x = WithoutZeros(TakeDigits(a));
      const absl::string_view y = WithoutZeros(TakeDigits(b));
      if (x.size() != y.size()) return x.size() < y.size() ? -1 : 1;
      if (const int order = x.compare(y); order != 0) return order;
      continue;
    }
    if (absl::ascii_isdigit(a[0]) != absl::ascii_isdigit(b[0])) {
      return absl::ascii_isdigit(a[0]) ? -1 : 1;
    }
    if (a[0] != b[0]) {
      return static_cast<unsigned char>(a[0]) < static_cast<unsigned char>(b[0]) ? -1 : 1;
    }
    a.remove_prefix(1);
    b.remove_prefix(1);
  }
  if (a.empty() != b.empty()) return a.empty() ? -1 : 1;
  return 0;
}

}  // namespace

bool VersionLess(absl::string_view a, absl::string_view b) {
  if (const int order = Compare(a, b); order != 0) return order < 0;
  if (a.size() != b.size()) return a.size() < b.size();
  return a < b;
}

bool IsOlder(const tables::DecisionTable& a, const tables::DecisionTable& b) {
  if (a.created() != b.created()) return a.created() < b.created();
  if (a.identity().version != b.identity().version) {
    return VersionLess(a.identity().version, b.identity().version);
  }
  return a.identity().digest < b.identity().digest;
}

}  // namespace keepset::service
