#include "kernels/cuda/region_pieces.h"

#include <algorithm>
#include <iterator>

#include "base/check.h"

namespace keepset::kernels::cuda {

RegionPieces::RegionPieces(int64_t bytes) : bytes_(bytes / kAlignment * kAlignment) {
  KEEPSET_CHECK(bytes_ > 0);
  free_.emplace(0, bytes_);
}

std::optional<int64_t> RegionPieces::Take(int64_t bytes) {
  if (bytes > bytes_) return std::nullopt;  // near the largest number a size has no meaning
  const int64_t size = SizeOf(bytes);
  const auto found = std::find_if(free_.begin(), free_.end(),
                                  [size](const auto& piece) { return piece.second >= size; });
  if (found == free_.end()) return std::nullopt;
  const auto [offset, free_bytes] = *found;
  free_.erase(found);
  if (free_bytes > size) free_.emplace(offset + size, free_bytes - size);
  used_bytes_ += size;
  peak_end_ = std::max(peak_end_, offset + size);
  return offset;
}

void RegionPieces::Return(int64_t offset, int64_t bytes) {
  int64_t size = SizeOf(bytes);
  used_bytes_ -= size;
  auto after = free_.lower_bound(offset);
  if (after != free_.end() && offset + size == after->first) {
    size += after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      before->second += size;
      return;
    }
  }
  free_.emplace(offset, size);
}

int64_t RegionPieces::largest_free() const {
  int64_t largest = 0;
  for (const auto& [offset, bytes] : free_) largest = std::max(largest, bytes);
  return largest;
}

}  // namespace keepset::kernels::cuda
