#include "engine/protection.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace keepset::engine {
namespace {

using Range = kernels::SelectArgs::Range;

// The parts of `ranges` outside `holes`.
PositionRanges Subtract(const PositionRanges& ranges, const PositionRanges& holes) {
  PositionRanges rest;
  for (const Range& range : ranges) {
    int64_t begin = range.begin;
    for (const Range& hole : holes) {
      if (hole.end <= begin || hole.begin >= range.end) continue;
      if (hole.begin > begin) rest.push_back({begin, hole.begin});
      begin = hole.end;
    }
    if (begin < range.end) rest.push_back({begin, range.end});
  }
  return rest;
}

}  // namespace

PositionRanges JoinRanges(PositionRanges ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  PositionRanges joined;
  for (const Range& range : ranges) {
    if (range.begin >= range.end) continue;
    if (!joined.empty() && range.begin <= joined.back().end) {
      joined.back().end = std::max(joined.back().end, range.end);
    } else {
      joined.push_back(range);
    }
  }
  return joined;
}

int64_t CountPositions(const PositionRanges& ranges) {
  int64_t count = 0;
  for (const Range& range : ranges) count += range.end - range.begin;
  return count;
}

absl::StatusOr<PositionRanges> ProtectedRanges(const OperationSpec& spec) {
  if (spec.protect_sink < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("protect_sink=", spec.protect_sink, ", want 0 or more"));
  }
  if (spec.protect_window < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("protect_window=", spec.protect_window, ", want 0 or more"));
  }
  PositionRanges ranges;
  ranges.push_back({0, std::min(spec.protect_sink, spec.seq_len)});
  ranges.push_back({spec.seq_len - std::min(spec.protect_window, spec.seq_len), spec.seq_len});
  for (size_t i = 0; i < spec.protect_spans.size(); ++i) {
    const ProtectedSpan& span = spec.protect_spans[i];
    if (span.begin < 0 || span.begin >= span.end || span.end > spec.seq_len) {
      return absl::InvalidArgumentError(absl::StrCat("protect_spans[", i, "] '", span.name,
                                                     "' is [", span.begin, ", ", span.end,
                                                     "), want 0 <= begin < end <= ", spec.seq_len));
    }
    ranges.push_back({span.begin, span.end});
  }
  return JoinRanges(std::move(ranges));
}

PositionRanges AddForcedRanges(const PositionRanges& protected_ranges, const PositionRanges& forced,
                               int64_t limit) {
  PositionRanges ranges = protected_ranges;
  int64_t room = limit - CountPositions(protected_ranges);
  const PositionRanges extra = Subtract(forced, protected_ranges);
  for (auto range = extra.rbegin(); range != extra.rend() && room > 0; ++range) {
    const int64_t taken = std::min(room, range->end - range->begin);
    ranges.push_back({range->end - taken, range->end});
    room -= taken;
  }
  return JoinRanges(std::move(ranges));
}

}  // namespace keepset::engine
