// How many positions of a row are kept, given its counts. Plain arithmetic, so that every backend
// keeps the same number.
#ifndef KEEPSET_KERNELS_SELECTION_PLAN_H_
#define KEEPSET_KERNELS_SELECTION_PLAN_H_

#include <cstdint>

namespace keepset::kernels {

struct SelectionCounts {
  int64_t length = 0;           // positions of the row
  int64_t num_protected = 0;    // of them always kept
  int64_t open_candidates = 0;  // unprotected positions at or above the threshold
  int64_t budget = 0;           // positions to keep at most, at least num_protected
  int64_t min_kept = 0;
};

// Unprotected positions to keep: the candidates as far as the budget goes, more when fewer than
// min(min_kept, budget) would stay.
constexpr int64_t WantedPositions(const SelectionCounts& counts) {
  const int64_t room = counts.budget - counts.num_protected;
  const int64_t gated = counts.open_candidates < room ? counts.open_candidates : room;
  const int64_t min_kept = counts.min_kept < counts.budget ? counts.min_kept : counts.budget;
  const int64_t least = min_kept - counts.num_protected;
  const int64_t open = counts.length - counts.num_protected;
  const int64_t wanted = gated > least ? gated : least;
  return wanted < open ? wanted : open;
}

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_SELECTION_PLAN_H_
