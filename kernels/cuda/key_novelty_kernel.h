// Bodies of the kernels of key_novelty.h.
#ifndef KEEPSET_KERNELS_CUDA_KEY_NOVELTY_KERNEL_H_
#define KEEPSET_KERNELS_CUDA_KEY_NOVELTY_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/fault_code.h"
#include "kernels/cuda/key_novelty.h"
#include "kernels/novelty_order.h"

namespace keepset::kernels::cuda {

// Joins the partial sums of half a warp; every lane of it gets the sum.
template <typename Simt>
KEEPSET_KERNEL_BODY inline float JoinHalfWarp(const Simt& simt, float part) {
  static_assert(kNoveltyLanes == 16);
  const int first = simt.lane() & 16;
  float sum = 0.0f;
  for (int lane = 0; lane < 16; ++lane) sum = simt.Add(sum, simt.ShuffleFrom(part, first + lane));
  return sum;
}

// The key of this half of the warp; null past the last, where the lanes go along with zeros.
template <typename Simt>
KEEPSET_KERNEL_BODY inline const std::byte* HalfWarpKey(const Simt& simt, const NoveltyParams& p,
                                                        int* token) {
  *token = simt.block_x() * (simt.num_threads() / 16) + simt.thread() / 16;
  if (*token >= p.k.num_tokens) return nullptr;
  return p.k.Row(p.kv_heads[simt.block_y()], *token);
}

KEEPSET_HD inline float Magnitude(float x) { return x < 0.0f ? -x : x; }

template <typename Simt>
KEEPSET_KERNEL_BODY void NoveltyLengths::Run(const Simt& simt, const Params& p) {
  int token;
  const std::byte* key = HalfWarpKey(simt, p, &token);
  const int end = key == nullptr ? 0 : p.k.head_dim;
  const int lane = simt.lane() & 15;
  const int64_t place = static_cast<int64_t>(simt.block_y()) * p.k.num_tokens + token;
  float largest = 0.0f;
  bool is_finite = true;
  for (int c = lane; c < end; c += 16) {
    const float x = LoadElement(key, c, p.k.dtype);
    is_finite = is_finite && IsFiniteValue(x);
    largest = simt.Max(largest, Magnitude(x));
  }
  if (!is_finite) simt.MinGlobal(p.fault, FaultCode(FaultKind::kNormInput, place));
  for (int mask = 1; mask < 16; mask *= 2) {
    largest = simt.Max(largest, simt.ShuffleXor(largest, mask));
  }
  float part = 0.0f;
  if (largest > 0.0f) {
    for (int c = lane; c < end; c += 16) {
      const float x = simt.Div(LoadElement(key, c, p.k.dtype), largest);
      part = simt.Add(part, simt.Mul(x, x));
    }
  }
  const float square = JoinHalfWarp(simt, part);
  if (key == nullptr || lane != 0) return;
  p.largest[place] = largest;
  p.inverses[place] = largest > 0.0f ? simt.Div(1.0f, simt.Sqrt(square)) : 0.0f;
}

template <typename Simt>
KEEPSET_KERNEL_BODY void NoveltyChunkSums::Run(const Simt& simt, const Params& p) {
  const int j = simt.block_y();
  const int begin = simt.block_x() * static_cast<int>(kNoveltyChunk);
  const int left = p.k.num_tokens - begin;
  const int end = begin + (left < kNoveltyChunk ? left : static_cast<int>(kNoveltyChunk));
  const float* largest = p.largest + static_cast<int64_t>(j) * p.k.num_tokens;
  const float* inverses = p.inverses + static_cast<int64_t>(j) * p.k.num_tokens;
  float* sums =
      p.chunk_sums + (static_cast<int64_t>(j) * p.num_chunks + simt.block_x()) * p.k.head_dim;
  for (int c = simt.thread(); c < p.k.head_dim; c += simt.num_threads()) {
    float sum = 0.0f;
    for (int t = begin; t < end; ++t) {
      if (!(largest[t] > 0.0f)) continue;
      const float x = simt.Div(LoadElement(p.k.Row(p.kv_heads[j], t), c, p.k.dtype), largest[t]);
      sum = simt.Add(sum, simt.Mul(x, inverses[t]));
    }
    sums[c] = sum;
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY void NoveltyMeans::Run(const Simt& simt, const Params& p) {
  auto* length = reinterpret_cast<double*>(simt.shared());  // of the head's sum of directions
  const int64_t j = simt.block_x();
  const float* sums = p.chunk_sums + j * p.num_chunks * p.k.head_dim;
  double* totals = p.totals + j * p.k.head_dim;
  for (int c = simt.thread(); c < p.k.head_dim; c += simt.num_threads()) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < p.num_chunks; ++chunk) {
      total = simt.Add(total, static_cast<double>(sums[chunk * p.k.head_dim + c]));
    }
    totals[c] = total;
  }
  simt.SyncBlock();
  if (simt.thread() == 0) {
    double square = 0.0;
    for (int c = 0; c < p.k.head_dim; ++c) {
      square = simt.Add(square, simt.Mul(totals[c], totals[c]));
    }
    *length = simt.Sqrt(square);
  }
  simt.SyncBlock();
  for (int c = simt.thread(); c < p.k.head_dim; c += simt.num_threads()) {
    p.means[j * p.k.head_dim + c] =
        *length > 0.0 ? static_cast<float>(simt.Div(totals[c], *length)) : 0.0f;
  }
}

template <typename Simt>
KEEPSET_KERNEL_BODY void NoveltyCosines::Run(const Simt& simt, const Params& p) {
  int token;
  const std::byte* key = HalfWarpKey(simt, p, &token);
  const int64_t place = static_cast<int64_t>(simt.block_y()) * p.k.num_tokens + token;
  const float* mean = p.means + static_cast<int64_t>(simt.block_y()) * p.k.head_dim;
  const float largest = key == nullptr ? 0.0f : p.largest[place];
  const int end = largest > 0.0f ? p.k.head_dim : 0;
  const int lane = simt.lane() & 15;
  float part = 0.0f;
  for (int c = lane; c < end; c += 16) {
    const float x = simt.Div(LoadElement(key, c, p.k.dtype), largest);
    part = simt.Add(part, simt.Mul(x, mean[c]));
  }
  const float dot = JoinHalfWarp(simt, part);
  if (key != nullptr && lane == 0) p.out[place] = simt.Mul(-dot, p.inverses[place]);
}

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_KEY_NOVELTY_KERNEL_H_
