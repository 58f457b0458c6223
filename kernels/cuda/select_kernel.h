// Body of the kernel of select.h.
#ifndef KEEPSET_KERNELS_CUDA_SELECT_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_SELECT_KERNEL_H_

#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/select.h"
#include "kernels/score_key.h"
#include "kernels/selection_plan.h"

namespace keepset::kernels::cuda {

// Shared memory of a block.
struct SelectShared {
  uint32_t counts[kMaxDigitValues];  // histogram of a digit
  uint32_t warp_sums[3][32];
  uint32_t first_nan;
  uint32_t cut_value;
  uint32_t cut_above;
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
        shared_(*reinterpret_cast<SelectShared*>(simt.shared())) {
    const int steps = (length_ + 31) / 32;
    const int steps_per_warp = (steps + simt.num_warps() - 1) / simt.num_warps();
    begin_ = static_cast<int64_t>(simt.warp()) * steps_per_warp * 32;
    end_ = begin_ + static_cast<int64_t>(steps_per_warp) * 32;
    if (end_ > length_) end_ = length_;
  }

  KEEPSET_KERNEL_BODY void Run(SelectRowResult* result, int32_t* keep_indices) {
    if (simt_.thread() == 0) shared_.first_nan = ~0u;
    const Counted counted = CountCandidates();
    if (shared_.first_nan != ~0u) {
      if (simt_.thread() == 0) *result = {0, 0, 0, static_cast<int64_t>(shared_.first_nan)};
      return;
    }
    SelectionCounts counts;
    counts.length = length_;
    counts.num_protected = args_.num_protected;
    counts.open_candidates = counted.open;
    counts.budget = args_.budget;
    counts.min_kept = args_.min_kept;
    const int64_t wanted = WantedPositions(counts);
    if (simt_.thread() == 0) {
      result->num_kept = args_.num_protected + wanted;
      result->candidates = static_cast<int64_t>(counted.open) + counted.guarded;
      result->filled = wanted > counted.open ? wanted - counted.open : 0;
      result->first_nan = -1;
    }
    uint32_t cut_key = args_.threshold_key;
    uint32_t ties = ~0u;
    if (wanted != counted.open) {
      cut_key = 0;
      ties = static_cast<uint32_t>(wanted);
      if (wanted > 0) FindCut(&cut_key, &ties);
    }
    Compact(cut_key, ties, wanted > 0, keep_indices);
  }

 private:
  struct Counted {
    uint32_t open;     // unprotected candidates
    uint32_t guarded;  // protected ones
  };

  // Calls fn(position, score, is_valid, is_protected) in steps of 32 positions, all lanes together.
  template <typename Fn>
  KEEPSET_KERNEL_BODY void ForSteps(Fn fn) {
    for (int64_t at = begin_; at < end_; at += 32) {
      const int64_t t = at + simt_.lane();
      const bool is_valid = t < end_;
      const uint32_t word = bitmap_ == nullptr ? 0u : bitmap_[at / 32];
      fn(t, is_valid ? scores_[t] : 0.0f, is_valid, ((word >> simt_.lane()) & 1u) != 0);
    }
  }

  // Sums of every warp's values before this warp, and of all; `slot` keeps uses apart.
  KEEPSET_KERNEL_BODY uint32_t SumBefore(uint32_t warp_value, int slot, uint32_t* total) {
    if (simt_.lane() == 0) shared_.warp_sums[slot][simt_.warp()] = warp_value;
    simt_.SyncBlock();
    uint32_t before = 0;
    uint32_t all = 0;
    for (int w = 0; w < simt_.num_warps(); ++w) {
      const uint32_t value = shared_.warp_sums[slot][w];
      if (w < simt_.warp()) before += value;
      all += value;
    }
    simt_.SyncBlock();
    *total = all;
    return before;
  }

  KEEPSET_HD static uint32_t BitCount(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return static_cast<uint32_t>(__popc(bits));
#else
    return static_cast<uint32_t>(__builtin_popcount(bits));
#endif
  }

  KEEPSET_KERNEL_BODY Counted CountCandidates() {
    uint32_t open = 0;
    uint32_t guarded = 0;
    uint32_t nan = ~0u;
    ForSteps([&](int64_t t, float score, bool is_valid, bool is_protected) {
      const bool is_nan = is_valid && IsNanScore(score);
      if (is_nan && nan == ~0u) nan = static_cast<uint32_t>(t);
      const bool is_candidate = is_valid && ScoreKey(score) >= args_.threshold_key;
      open += BitCount(simt_.Ballot(is_candidate && !is_protected));
      guarded += BitCount(simt_.Ballot(is_candidate && is_protected));
    });
    Counted counted;
    SumBefore(open, 0, &counted.open);  // begins with the block in step, after first_nan was set
    SumBefore(guarded, 1, &counted.guarded);
    if (nan != ~0u) simt_.MinShared(&shared_.first_nan, nan);
    simt_.SyncBlock();
    return counted;
  }

  // The smallest kept key, and how many of its positions are kept; *ties enters as the number of
  // wanted positions.
  KEEPSET_KERNEL_BODY void FindCut(uint32_t* cut_key, uint32_t* ties) {
    for (int digit = 0; digit < kKeyDigits; ++digit) {
      for (int i = simt_.thread(); i < kMaxDigitValues; i += simt_.num_threads()) {
        shared_.counts[i] = 0;
      }
      simt_.SyncBlock();
      const uint32_t prefix = *cut_key;
      ForSteps([&](int64_t, float score, bool is_valid, bool is_protected) {
        const uint32_t key = ScoreKey(score);
        const bool counts = is_valid && !is_protected && MatchesPrefix(key, prefix, digit);
        // Scores of attention share their leading digits: equal ones are counted together.
        const uint32_t value = counts ? KeyDigit(key, digit) : ~0u;
        const uint32_t peers = simt_.MatchAny(value);
        const bool is_first = (peers & ((1u << simt_.lane()) - 1u)) == 0;
        if (counts && is_first) simt_.AddShared(&shared_.counts[value], BitCount(peers));
      });
      simt_.SyncBlock();
      FindDigit(digit, *ties);
      *cut_key |= shared_.cut_value << KeyDigitShift(digit);
      *ties -= shared_.cut_above;
      simt_.SyncBlock();
    }
  }

  // FindDigitCut of score_key.h by all threads: the digit value at which counting down reaches
  // `wanted`, and the count above it. Each thread has a run of values, the highest first.
  KEEPSET_KERNEL_BODY void FindDigit(int digit, uint32_t wanted) {
    const int values = 1 << KeyDigitBits(digit);
    const int per_thread = (values + simt_.num_threads() - 1) / simt_.num_threads();
    const int high = values - 1 - simt_.thread() * per_thread;
    uint32_t mine = 0;
    for (int i = 0; i < per_thread && high - i >= 0; ++i) mine += shared_.counts[high - i];
    // Inclusive scan over the lanes.
    uint32_t scanned = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int from = simt_.lane() >= distance ? simt_.lane() - distance : simt_.lane();
      const uint32_t other = simt_.ShuffleFrom(scanned, from);
      if (simt_.lane() >= distance) scanned += other;
    }
    const uint32_t warp_total = simt_.ShuffleFrom(scanned, 31);
    uint32_t all = 0;
    uint32_t above = SumBefore(warp_total, 2, &all) + scanned - mine;
    if (above < wanted && above + mine >= wanted) {
      for (int i = 0; i < per_thread; ++i) {
        const uint32_t here = shared_.counts[high - i];
        if (above + here >= wanted) {
          shared_.cut_value = static_cast<uint32_t>(high - i);
          shared_.cut_above = above;
          break;
        }
        above += here;
      }
    }
    simt_.SyncBlock();
  }

  // Writes the kept positions in ascending order.
  KEEPSET_KERNEL_BODY void Compact(uint32_t cut_key, uint32_t ties, bool keeps_open,
                                   int32_t* keep_indices) {
    uint32_t above = 0;
    uint32_t equal = 0;
    const auto classify = [&](float score, bool is_valid, bool is_protected, bool* is_above,
                              bool* is_equal) {
      const uint32_t key = ScoreKey(score);
      const bool is_open = is_valid && !is_protected && keeps_open;
      *is_above = (is_valid && is_protected) || (is_open && key > cut_key);
      *is_equal = is_open && key == cut_key;
    };
    ForSteps([&](int64_t, float score, bool is_valid, bool is_protected) {
      bool is_above;
      bool is_equal;
      classify(score, is_valid, is_protected, &is_above, &is_equal);
      above += BitCount(simt_.Ballot(is_above));
      equal += BitCount(simt_.Ballot(is_equal));
    });
    uint32_t total = 0;
    const uint32_t above_before = SumBefore(above, 0, &total);
    const uint32_t equal_before = SumBefore(equal, 1, &total);
    // Of the ties, those of lower positions come first.
    uint32_t ties_seen = equal_before;
    uint32_t to = above_before + (equal_before < ties ? equal_before : ties);
    const uint32_t lower_lanes = (1u << simt_.lane()) - 1u;
    ForSteps([&](int64_t t, float score, bool is_valid, bool is_protected) {
      bool is_above;
      bool is_equal;
      classify(score, is_valid, is_protected, &is_above, &is_equal);
      const uint32_t equal_lanes = simt_.Ballot(is_equal);
      const bool is_kept_tie = is_equal && ties_seen + BitCount(equal_lanes & lower_lanes) < ties;
      const uint32_t kept = simt_.Ballot(is_above || is_kept_tie);
      if (is_above || is_kept_tie) {
        keep_indices[to + BitCount(kept & lower_lanes)] = static_cast<int32_t>(t);
      }
      to += BitCount(kept);
      ties_seen += BitCount(equal_lanes);
    });
  }

  const Simt& simt_;
  const SelectRowArgs args_;
  const float* scores_;
  const uint32_t* bitmap_;
  const int length_;
  SelectShared& shared_;
  int64_t begin_;  // the warp's segment
  int64_t end_;
};

template <typename Simt>
KEEPSET_KERNEL_BODY void SelectKernel::Run(const Simt& simt, const Params& p) {
  const int row = simt.block_x();
  RowSelection<Simt>(simt, p, row).Run(p.results + row, p.keep_indices + row * p.capacity);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_SELECT_KERNEL_H_
