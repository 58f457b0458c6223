// Sets of positions as bits, for kernels: bit t % 32 of word t / 32 is position t.
#ifndef KEEPSET_KERNELS_CUDA_POSITION_BITMAP_H_
#define KEEPSET_KERNELS_CUDA_POSITION_BITMAP_H_

#include <cstdint>

namespace keepset::kernels::cuda {

constexpr int64_t kBitsPerWord = 32;

constexpr int64_t BitmapWords(int64_t positions) {
  return (positions + kBitsPerWord - 1) / kBitsPerWord;
}

// Sets positions [begin, end).
inline void SetBits(int64_t begin, int64_t end, uint32_t* words) {
  for (int64_t t = begin; t < end;) {
    if (t % kBitsPerWord == 0 && t + kBitsPerWord <= end) {
      words[t / kBitsPerWord] = ~0u;
      t += kBitsPerWord;
    } else {
      words[t / kBitsPerWord] |= 1u << (t % kBitsPerWord);
      ++t;
    }
  }
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_POSITION_BITMAP_H_
