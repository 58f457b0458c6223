// Novelty of keys: how far a key's direction lies from the mean direction of its head. Two sweeps
// over the listed heads. The means are summed per chunk and the chunks in order, so neither the
// number of threads nor their schedule shows in the bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/element.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/pack_simd.h"
#include "kernels/cpu/row_pointers.h"
#include "kernels/novelty_order.h"
#include "kernels/op_checks.h"

namespace keepset::kernels::cpu {
namespace {

// The lanes may lie in vector registers.
float Dot(const float* a, const float* b, int64_t count) {
  float parts[kNoveltyLanes] = {};
  int64_t c = 0;
  for (; c + kNoveltyLanes <= count; c += kNoveltyLanes) {
    for (int64_t j = 0; j < kNoveltyLanes; ++j) parts[j] += a[c + j] * b[c + j];
  }
  for (int64_t j = 0; c < count; ++c, ++j) parts[j] += a[c] * b[c];
  float sum = 0.0f;
  for (const float part : parts) sum += part;
  return sum;
}

// 1 / |key| after scaling by its largest element, so that squares of any finite key fit fp32; the
// key is scaled in place. 0 for a zero key.
float ScaleAndInvert(float* key, int64_t count) {
  float largest = 0.0f;
  for (int64_t c = 0; c < count; ++c) largest = std::max(largest, std::abs(key[c]));
  if (largest == 0.0f) return 0.0f;
  for (int64_t c = 0; c < count; ++c) key[c] /= largest;
  return 1.0f / std::sqrt(Dot(key, key, count));
}

}  // namespace

absl::Status KeyNovelty(CpuContext& context, const KvView& k, absl::Span<const int64_t> kv_heads,
                        absl::string_view what, ScoreBuffer& out) {
  KEEPSET_RETURN_IF_ERROR(CheckKeyNovelty(k, kv_heads, what, out));
  const auto num_heads = static_cast<int64_t>(kv_heads.size());
  const int64_t head_dim = k.head_dim;
  const int64_t tasks_per_head = (k.seq_len + kNoveltyChunk - 1) / kNoveltyChunk;
  KEEPSET_RETURN_IF_ERROR(
      context.ReserveSlots(SlotScratch::kPointers, kNoveltyChunk * int64_t{sizeof(void*)}));
  KEEPSET_RETURN_IF_ERROR(
      context.ReserveSlots(SlotScratch::kStaging, head_dim * int64_t{sizeof(float)}));

  // Calls fn(key scaled by its largest element, 1 / its length then, position) for a task's keys.
  const auto for_keys = [&](int64_t task, int slot, const auto& fn) -> absl::Status {
    const int64_t head = kv_heads[task / tasks_per_head];
    const int64_t begin = task % tasks_per_head * kNoveltyChunk;
    const int64_t count = std::min(kNoveltyChunk, k.seq_len - begin);
    const std::byte** rows = context.slot(slot, SlotScratch::kPointers).as<const std::byte*>();
    float* key = context.slot(slot, SlotScratch::kStaging).as<float>();
    RowPointers(k, head, begin, count, rows);
    for (int64_t i = 0; i < count; ++i) {
      Widen(rows[i], head_dim, k.dtype, key);
      const float inverse = ScaleAndInvert(key, head_dim);
      // A maximum passes over NaN, so a key of zeros and NaN looks like a zero key.
      if ((inverse == 0.0f || !IsFinite(inverse)) &&
          FindNonFinite(rows[i], head_dim, k.dtype) >= 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(what, ": head ", head, " position ", begin + i, " is not finite"));
      }
      fn(key, inverse, begin + i);
    }
    return absl::OkStatus();
  };

  std::vector<float> sums(num_heads * tasks_per_head * head_dim, 0.0f);
  KEEPSET_RETURN_IF_ERROR(
      context.TryParallelFor(num_heads * tasks_per_head, [&](int64_t task, int slot) {
        float* sum = sums.data() + task * head_dim;
        return for_keys(task, slot, [&](const float* key, float inverse, int64_t /*t*/) {
          for (int64_t c = 0; c < head_dim; ++c) sum[c] += key[c] * inverse;
        });
      }));
  // The direction alone counts: the mean is scaled to unit length.
  std::vector<float> means(num_heads * head_dim, 0.0f);
  for (int64_t j = 0; j < num_heads; ++j) {
    std::vector<double> total(head_dim, 0.0);
    for (int64_t task = j * tasks_per_head; task < (j + 1) * tasks_per_head; ++task) {
      for (int64_t c = 0; c < head_dim; ++c) total[c] += sums[task * head_dim + c];
    }
    double square = 0.0;
    for (const double value : total) square += value * value;
    if (square == 0.0) continue;
    for (int64_t c = 0; c < head_dim; ++c) {
      means[j * head_dim + c] = static_cast<float>(total[c] / std::sqrt(square));
    }
  }
  return context.TryParallelFor(num_heads * tasks_per_head, [&](int64_t task, int slot) {
    const int64_t j = task / tasks_per_head;
    return for_keys(task, slot, [&](const float* key, float inverse, int64_t t) {
      out.data()[j * k.seq_len + t] = -Dot(key, means.data() + j * head_dim, head_dim) * inverse;
    });
  });
}

}  // namespace keepset::kernels::cpu
