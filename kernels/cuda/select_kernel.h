// Body of the kernel of select.h.
//
// A row is read four times at most: its candidates and the first digit of its keys are counted
// together, the two other digits are counted among the keys that the digits before leave open, and
// then one bit per position says what is kept. Positions are written from the bits.
#ifndef KEEPSET_KERNELS_CUDA_SELECT_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_SELECT_KERNEL_H_

#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/select.h"
#include "kernels/score_key.h"
#include "kernels/selection_plan.h"

namespace keepset::kernels::cuda {

// Steps of 32 positions whose scores a warp has on their way together.
constexpr int kSelectSteps = 4;
// Scores of attention share their leading digits: lanes count in so many histograms, side by side,
// that few of a warp meet in one counter.
constexpr int kCounterCopies = 4;
// Positions of which the bits are in shared memory at a time: 2^17.
constexpr int kSlabWords = kMaxDigitValues * kCounterCopies / 2;

// Shared memory of a block.
struct SelectShared {
  union {
    uint32_t counts[kMaxDigitValues][kCounterCopies];  // histogram of a digit
    struct {
      uint32_t above[kSlabWords];  // kept whatever the ties
      uint32_t equal[kSlabWords];  // at the cut
    } bits;
  };
  uint32_t warp_sums[2][32];
  uint32_t candidates[2];  // unprotected, protected
  uint32_t first_nan;
  uint32_t cut_value;
  uint32_t cut_above;
  uint32_t cut_here;
};

template <typename Simt>
class RowSelection {
 public:
  KEEPSET_KERNEL_BODY RowSelection(const Simt& simt, const SelectParams& p, int row)
      : simt_(simt),
        args_(p.args[row]),
        scores_(args_.scores),
        bitmap_(args_.bitmap_begin < 0 ? nullptr : p.bitmaps + args_.bitmap_begin),
        length_(static_cast<int>(args_.length)),
        shared_(*reinterpret_cast<SelectShared*>(simt.shared())) {}

  KEEPSET_KERNEL_BODY void Run(SelectRowResult* result, int32_t* keep_indices) {
    CountCandidates();
    if (shared_.first_nan != ~0u) {
      if (simt_.thread() == 0) *result = {0, 0, 0, static_cast<int64_t>(shared_.first_nan)};
      return;
    }
    const uint32_t open = shared_.candidates[0];
    SelectionCounts counts;
    counts.length = length_;
    counts.num_protected = args_.num_protected;
    counts.open_candidates = open;
    counts.budget = args_.budget;
    counts.min_kept = args_.min_kept;
    const int64_t wanted = WantedPositions(counts);
    if (simt_.thread() == 0) {
      result->num_kept = args_.num_protected + wanted;
      result->candidates = static_cast<int64_t>(open) + shared_.candidates[1];
      result->filled = wanted > open ? wanted - open : 0;
      result->first_nan = -1;
    }
    uint32_t cut_key = args_.threshold_key;
    uint32_t ties = ~0u;
    if (wanted != open) {
      cut_key = 0;
      ties = static_cast<uint32_t>(wanted);
      if (wanted > 0) FindCut(&cut_key, &ties);
    }
    Compact(cut_key, ties, wanted > 0, keep_indices);
  }

 private:
  KEEPSET_HD static uint32_t BitCount(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return static_cast<uint32_t>(__popc(bits));
#else
    return static_cast<uint32_t>(__builtin_popcount(bits));
#endif
  }
  // Of bits != 0.
  KEEPSET_HD static int LowestBit(uint32_t bits) {
    return static_cast<int>(BitCount(~bits & (bits - 1)));
  }

  // Calls fn(word, score, is_valid, is_protected) for position 32 * word + lane of words begin to
  // end, all lanes of a warp together; warps take kSelectSteps words in turns.
  template <typename Fn>
  KEEPSET_KERNEL_BODY void ForWords(int begin, int end, Fn fn) {
    for (int first = begin + simt_.warp() * kSelectSteps; first < end;
         first += simt_.num_warps() * kSelectSteps) {
      float scores[kSelectSteps];
      uint32_t guarded[kSelectSteps];
      KEEPSET_UNROLL
      for (int i = 0; i < kSelectSteps; ++i) {
        const int64_t t = static_cast<int64_t>(first + i) * 32 + simt_.lane();
        scores[i] = t < length_ ? scores_[t] : 0.0f;
        guarded[i] = bitmap_ != nullptr && first + i < end ? bitmap_[first + i] : 0u;
      }
      KEEPSET_UNROLL
      for (int i = 0; i < kSelectSteps; ++i) {
        if (first + i >= end) break;
        const int64_t t = static_cast<int64_t>(first + i) * 32 + simt_.lane();
        fn(first + i, scores[i], t < length_, ((guarded[i] >> simt_.lane()) & 1u) != 0);
      }
    }
  }
  KEEPSET_KERNEL_BODY int num_words() const {
    return static_cast<int>((static_cast<int64_t>(length_) + 31) / 32);
  }

  KEEPSET_KERNEL_BODY uint32_t WarpSum(uint32_t value) {
    for (int mask = 1; mask < 32; mask *= 2) value += simt_.ShuffleXor(value, mask);
    return value;
  }
  // Inclusive, over the lanes.
  KEEPSET_KERNEL_BODY uint32_t WarpScan(uint32_t value) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const int from = simt_.lane() >= distance ? simt_.lane() - distance : simt_.lane();
      const uint32_t other = simt_.ShuffleFrom(value, from);
      if (simt_.lane() >= distance) value += other;
    }
    return value;
  }
  // The sum of the values of all threads before this one; *total: of all. `slot` keeps two uses
  // apart. Ends with the block in step.
  KEEPSET_KERNEL_BODY uint32_t SumBefore(uint32_t value, int slot, uint32_t* total) {
    const uint32_t scanned = WarpScan(value);
    if (simt_.lane() == 31) shared_.warp_sums[slot][simt_.warp()] = scanned;
    simt_.SyncBlock();
    const uint32_t of_warps =
        WarpScan(simt_.lane() < simt_.num_warps() ? shared_.warp_sums[slot][simt_.lane()] : 0u);
    *total = simt_.ShuffleFrom(of_warps, 31);
    const uint32_t through = simt_.ShuffleFrom(of_warps, simt_.warp());
    const uint32_t mine = simt_.ShuffleFrom(scanned, 31);
    simt_.SyncBlock();
    return through - mine + scanned - value;
  }

  KEEPSET_KERNEL_BODY void ClearCounts() {
    uint32_t* const counts = &shared_.counts[0][0];
    for (int i = simt_.thread(); i < kMaxDigitValues * kCounterCopies; i += simt_.num_threads()) {
      counts[i] = 0;
    }
  }
  KEEPSET_KERNEL_BODY void Count(uint32_t key, int digit) {
    simt_.AddShared(&shared_.counts[KeyDigit(key, digit)][simt_.lane() & (kCounterCopies - 1)], 1);
  }

  // The candidates, the first NaN, and the histogram of the first digit.
  KEEPSET_KERNEL_BODY void CountCandidates() {
    ClearCounts();
    if (simt_.thread() == 0) {
      shared_.first_nan = ~0u;
      shared_.candidates[0] = shared_.candidates[1] = 0;
    }
    simt_.SyncBlock();
    uint32_t open = 0;
    uint32_t guarded = 0;
    uint32_t nan = ~0u;
    ForWords(0, num_words(), [&](int word, float score, bool is_valid, bool is_protected) {
      if (!is_valid) return;
      if (IsNanScore(score) && nan == ~0u) nan = static_cast<uint32_t>(word) * 32 + simt_.lane();
      const uint32_t key = ScoreKey(score);
      const uint32_t is_candidate = key >= args_.threshold_key ? 1 : 0;
      if (is_protected) {
        guarded += is_candidate;
      } else {
        open += is_candidate;
        Count(key, 0);
      }
    });
    if (nan != ~0u) simt_.MinShared(&shared_.first_nan, nan);
    open = WarpSum(open);
    guarded = WarpSum(guarded);
    if (simt_.lane() == 0) {
      simt_.AddShared(&shared_.candidates[0], open);
      simt_.AddShared(&shared_.candidates[1], guarded);
    }
    simt_.SyncBlock();
  }

  // The smallest kept key, and how many of its positions are kept; *ties enters as the number of
  // wanted positions. The first digit has been counted.
  KEEPSET_KERNEL_BODY void FindCut(uint32_t* cut_key, uint32_t* ties) {
    for (int digit = 0;; ++digit) {
      FindDigit(digit, *ties);
      *cut_key |= shared_.cut_value << KeyDigitShift(digit);
      *ties -= shared_.cut_above;
      // All keys that begin so are kept: the smallest one that may is as good a cut.
      const bool is_whole = *ties == shared_.cut_here;
      simt_.SyncBlock();
      if (is_whole) {
        *ties = ~0u;
        return;
      }
      if (digit == kKeyDigits - 1) return;
      ClearCounts();
      simt_.SyncBlock();
      const uint32_t prefix = *cut_key;
      ForWords(0, num_words(), [&](int, float score, bool is_valid, bool is_protected) {
        const uint32_t key = ScoreKey(score);
        if (is_valid && !is_protected && MatchesPrefix(key, prefix, digit + 1)) {
          Count(key, digit + 1);
        }
      });
      simt_.SyncBlock();
    }
  }

  KEEPSET_KERNEL_BODY uint32_t CountOf(int value) const {
    uint32_t count = 0;
    KEEPSET_UNROLL
    for (int copy = 0; copy < kCounterCopies; ++copy) count += shared_.counts[value][copy];
    return count;
  }

  // FindDigitCut of score_key.h by all threads: the digit value at which counting down reaches
  // `wanted`, the count above it and its own. Each thread has a run of values, the highest first.
  KEEPSET_KERNEL_BODY void FindDigit(int digit, uint32_t wanted) {
    const int values = 1 << KeyDigitBits(digit);
    const int per_thread = (values + simt_.num_threads() - 1) / simt_.num_threads();
    const int high = values - 1 - simt_.thread() * per_thread;
    uint32_t mine = 0;
    for (int i = 0; i < per_thread && high - i >= 0; ++i) mine += CountOf(high - i);
    uint32_t all = 0;
    uint32_t above = SumBefore(mine, 0, &all);
    if (above < wanted && above + mine >= wanted) {
      for (int i = 0; i < per_thread; ++i) {
        const uint32_t here = CountOf(high - i);
        if (above + here >= wanted) {
          shared_.cut_value = static_cast<uint32_t>(high - i);
          shared_.cut_above = above;
          shared_.cut_here = here;
          break;
        }
        above += here;
      }
    }
    simt_.SyncBlock();
  }

  // Writes the kept positions in ascending order: those above the cut, and the first `ties` at it.
  KEEPSET_KERNEL_BODY void Compact(uint32_t cut_key, uint32_t ties, bool keeps_open,
                                   int32_t* keep_indices) {
    uint32_t above_before = 0;  // in the slabs before
    uint32_t equal_before = 0;
    for (int begin = 0; begin < num_words(); begin += kSlabWords) {
      const int left = num_words() - begin;
      const int words = left < kSlabWords ? left : kSlabWords;
      MarkSlab(begin, words, cut_key, keeps_open);
      simt_.SyncBlock();
      // A run of words for each thread.
      const int per_thread = (words + simt_.num_threads() - 1) / simt_.num_threads();
      const int first = simt_.thread() * per_thread;
      const int last = first + per_thread < words ? first + per_thread : words;
      uint32_t above = 0;
      uint32_t equal = 0;
      for (int word = first; word < last; ++word) {
        above += BitCount(shared_.bits.above[word]);
        equal += BitCount(shared_.bits.equal[word]);
      }
      uint32_t all_above = 0;
      uint32_t all_equal = 0;
      above = above_before + SumBefore(above, 0, &all_above);
      equal = equal_before + SumBefore(equal, 1, &all_equal);
      // Of the ties, those of lower positions come first.
      uint32_t ties_left = equal < ties ? ties - equal : 0;
      int32_t* to = keep_indices + above + (equal < ties ? equal : ties);
      for (int word = first; word < last; ++word) {
        uint32_t kept = shared_.bits.above[word];
        for (uint32_t tied = shared_.bits.equal[word]; tied != 0 && ties_left > 0; --ties_left) {
          kept |= tied & (~tied + 1);
          tied &= tied - 1;
        }
        for (; kept != 0; kept &= kept - 1) *to++ = (begin + word) * 32 + LowestBit(kept);
      }
      above_before += all_above;
      equal_before += all_equal;
      // The bits are written over.
      simt_.SyncBlock();
    }
  }

  KEEPSET_KERNEL_BODY void MarkSlab(int begin, int words, uint32_t cut_key, bool keeps_open) {
    ForWords(begin, begin + words, [&](int word, float score, bool is_valid, bool is_protected) {
      const uint32_t key = ScoreKey(score);
      const bool is_open = is_valid && !is_protected && keeps_open;
      const uint32_t above = simt_.Ballot((is_valid && is_protected) || (is_open && key > cut_key));
      const uint32_t equal = simt_.Ballot(is_open && key == cut_key);
      if (simt_.lane() == 0) {
        shared_.bits.above[word - begin] = above;
        shared_.bits.equal[word - begin] = equal;
      }
    });
  }

  const Simt& simt_;
  const SelectRowArgs args_;
  const float* scores_;
  const uint32_t* bitmap_;
  const int length_;
  SelectShared& shared_;
};

template <typename Simt>
KEEPSET_KERNEL_BODY void SelectKernel::Run(const Simt& simt, const Params& p) {
  const int row = simt.block_x();
  RowSelection<Simt>(simt, p, row).Run(p.results + row, p.keep_indices + row * p.capacity);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_SELECT_KERNEL_H_
