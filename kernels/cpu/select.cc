// Exact selection without a sort: the key of the last kept score is found by histograms of its
// digits, then one ordered pass writes the positions. Ties at that key are given to the lower
// positions because the pass ascends.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/ops.h"
#include "kernels/op_checks.h"
#include "kernels/score_key.h"
#include "kernels/selection_plan.h"

namespace keepset::kernels::cpu {
namespace {

// fn(begin, end, is_protected) over [0, length) in ascending order.
template <typename Fn>
void ForSpans(const SelectArgs& args, int64_t length, Fn fn) {
  int64_t at = 0;
  for (const SelectArgs::Range& range : args.protected_ranges) {
    if (at < range.begin) fn(at, range.begin, false);
    if (range.begin < range.end) fn(range.begin, range.end, true);
    at = range.end;
  }
  if (at < length) fn(at, length, false);
}

// The smallest kept key among the unprotected, and how many of its positions are kept.
struct Cut {
  uint32_t key = 0;
  int64_t ties = 0;
};

// wanted: 1..number of unprotected positions.
Cut FindCut(const float* scores, int64_t length, const SelectArgs& args, int64_t wanted,
            uint32_t* counts) {
  Cut cut;
  cut.ties = wanted;
  for (int digit = 0; digit < kKeyDigits; ++digit) {
    std::fill(counts, counts + kMaxDigitValues, 0u);
    ForSpans(args, length, [&](int64_t begin, int64_t end, bool is_protected) {
      if (is_protected) return;
      for (int64_t t = begin; t < end; ++t) {
        const uint32_t key = ScoreKey(scores[t]);
        if (MatchesPrefix(key, cut.key, digit)) ++counts[KeyDigit(key, digit)];
      }
    });
    const DigitCut found = FindDigitCut(counts, digit, cut.ties);
    cut.key |= found.value << KeyDigitShift(digit);
    cut.ties -= found.above;
  }
  return cut;
}

absl::StatusOr<Selection> SelectRow(const float* scores, int64_t length, const SelectArgs& args,
                                    int64_t row, uint32_t* counts) {
  KEEPSET_RETURN_IF_ERROR(CheckSelectRow(args, length, row));
  const uint32_t threshold = ScoreKey(args.threshold);
  int64_t num_protected = 0;
  int64_t protected_candidates = 0;
  int64_t open_candidates = 0;
  int64_t first_nan = -1;
  ForSpans(args, length, [&](int64_t begin, int64_t end, bool is_protected) {
    int64_t candidates = 0;
    bool has_nan = false;
    for (int64_t t = begin; t < end; ++t) {
      candidates += ScoreKey(scores[t]) >= threshold;
      has_nan |= IsNanScore(scores[t]);
    }
    (is_protected ? protected_candidates : open_candidates) += candidates;
    if (is_protected) num_protected += end - begin;
    for (int64_t t = begin; has_nan && first_nan < 0 && t < end; ++t) {
      if (IsNanScore(scores[t])) first_nan = t;
    }
  });
  if (first_nan >= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("select: row ", row, " position ", first_nan, " is NaN, want a number"));
  }

  Selection selection;
  selection.candidates = protected_candidates + open_candidates;
  SelectionCounts counts_of_row;
  counts_of_row.length = length;
  counts_of_row.num_protected = num_protected;
  counts_of_row.open_candidates = open_candidates;
  counts_of_row.budget = args.budget;
  counts_of_row.min_kept = args.min_kept;
  const int64_t wanted = WantedPositions(counts_of_row);
  selection.filled = std::max<int64_t>(0, wanted - open_candidates);
  selection.keep_indices.resize(num_protected + wanted);
  Cut cut;
  if (wanted > 0) cut = FindCut(scores, length, args, wanted, counts);
  int32_t* to = selection.keep_indices.data();
  ForSpans(args, length, [&](int64_t begin, int64_t end, bool is_protected) {
    if (!is_protected && wanted == 0) return;
    for (int64_t t = begin; t < end; ++t) {
      if (!is_protected) {
        const uint32_t key = ScoreKey(scores[t]);
        if (key < cut.key || (key == cut.key && cut.ties-- <= 0)) continue;
      }
      *to++ = static_cast<int32_t>(t);
    }
  });
  return selection;
}

}  // namespace

absl::StatusOr<std::vector<Selection>> Select(CpuContext& context, const ScoreBuffer& scores,
                                              absl::Span<const SelectArgs> args) {
  const int64_t rows = scores.rows();
  const int64_t cols = scores.cols();
  KEEPSET_RETURN_IF_ERROR(CheckSelect(args, scores));
  KEEPSET_RETURN_IF_ERROR(
      context.ReserveSlots(SlotScratch::kStaging, kMaxDigitValues * int64_t{sizeof(uint32_t)}));
  std::vector<Selection> selections(rows);
  KEEPSET_RETURN_IF_ERROR(context.TryParallelFor(rows, [&](int64_t row, int slot) -> absl::Status {
    KEEPSET_ASSIGN_OR_RETURN(
        selections[row],
        SelectRow(scores.data() + row * cols, cols, args[args.size() == 1 ? 0 : row], row,
                  context.slot(slot, SlotScratch::kStaging).as<uint32_t>()));
    return absl::OkStatus();
  }));
  return selections;
}

}  // namespace keepset::kernels::cpu
