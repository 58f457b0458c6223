// Order-preserving integer images of fp32 scores, and the digits by which an exact top-k narrows
// them. Plain arithmetic without memory or library calls, so that every backend cuts at the same
// score.
#ifndef KEEPSET_KERNELS_SCORE_KEY_H_
#define KEEPSET_KERNELS_SCORE_KEY_H_

#include <bit>
#include <cstdint>

namespace keepset::kernels {

// a < b as floats exactly when ScoreKey(a) < ScoreKey(b); -0.0 and +0.0 share a key. Not for NaN.
constexpr uint32_t ScoreKey(float score) {
  uint32_t bits = std::bit_cast<uint32_t>(score);
  if ((bits & 0x7fffffffu) == 0) bits = 0;
  return (bits & 0x80000000u) != 0 ? ~bits : (bits | 0x80000000u);
}

constexpr bool IsNanScore(float score) {
  return (std::bit_cast<uint32_t>(score) & 0x7fffffffu) > 0x7f800000u;
}

// A key is read as three digits of 11, 11 and 10 bits, the most significant first.
constexpr int kKeyDigits = 3;
constexpr int kMaxDigitValues = 1 << 11;

constexpr int KeyDigitShift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }
constexpr int KeyDigitBits(int digit) { return digit == 2 ? 10 : 11; }

constexpr uint32_t KeyDigit(uint32_t key, int digit) {
  return (key >> KeyDigitShift(digit)) & ((1u << KeyDigitBits(digit)) - 1u);
}

// Whether the digits before `digit` equal those of `prefix` (a key with known leading digits).
constexpr bool MatchesPrefix(uint32_t key, uint32_t prefix, int digit) {
  return digit == 0 || ((key ^ prefix) >> KeyDigitShift(digit - 1)) == 0;
}

// The digit value at which counting down from the highest reaches `wanted` (>= 1) keys, and how
// many keys lie strictly above it.
struct DigitCut {
  uint32_t value = 0;
  int64_t above = 0;
};

// counts: [1 << KeyDigitBits(digit)]; their sum is at least `wanted`.
template <typename Count>
constexpr DigitCut FindDigitCut(const Count* counts, int digit, int64_t wanted) {
  DigitCut cut;
  for (uint32_t value = 1u << KeyDigitBits(digit); value-- > 0;) {
    const int64_t here = static_cast<int64_t>(counts[value]);
    if (cut.above + here >= wanted || value == 0) {
      cut.value = value;
      break;
    }
    cut.above += here;
  }
  return cut;
}

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_SCORE_KEY_H_
