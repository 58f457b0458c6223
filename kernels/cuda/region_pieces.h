// Which parts of a fixed range of memory are lent.
#ifndef KEEPSET_KERNELS_CUDA_REGION_PIECES_H_
#define KEEPSET_KERNELS_CUDA_REGION_PIECES_H_

#include <cstdint>
#include <map>
#include <optional>

namespace keepset::kernels::cuda {

// First fit from the beginning, neighbours that return become one: where a piece lies depends on
// what was taken and returned before, and in which order, alone. So a sequence that ends at most at
// `peak_end` of a range fits every range of that size. Not thread-safe.
class RegionPieces {
 public:
  static constexpr int64_t kAlignment = 256;
  // What a piece of `bytes` takes.
  static int64_t SizeOf(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  explicit RegionPieces(int64_t bytes);

  // The offset of a piece of SizeOf(bytes), bytes >= 1; nothing: none is free.
  std::optional<int64_t> Take(int64_t bytes);
  // A piece as it was taken.
  void Return(int64_t offset, int64_t bytes);

  int64_t bytes() const { return bytes_; }
  int64_t free_bytes() const { return bytes_ - used_bytes_; }
  int64_t largest_free() const;
  // The farthest end of any piece so far: a range of that size would have done.
  int64_t peak_end() const { return peak_end_; }

 private:
  const int64_t bytes_;
  std::map<int64_t, int64_t> free_;  // offset -> bytes; no two touch
  int64_t used_bytes_ = 0;
  int64_t peak_end_ = 0;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_REGION_PIECES_H_
