// What HopperColumns does with a product: powers, sums over query rows, and the rows of the result.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_EPILOGUE_INL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_EPILOGUE_INL_H_

#include <cstdint>

#include "kernels/cuda/column_inl.h"
#include "kernels/cuda/hopper_pipeline_inl.h"
#include "kernels/cuda/host_device.h"

namespace keepset::kernels::cuda {

// Slots between two places where plain outputs may end.
constexpr int kPlainSlots = 32;

// What a thread adds up: two tokens, 8 rows of the tile apart.
template <int kSlots>
class ColumnEpilogue {
 public:
  // One product: `logits` of slots first_slot to first_slot + kSlots. `target` is that of the
  // output that the first slot belongs to. is_plain: no token of the tile is masked for any row, no
  // output is a maximum, and outputs end at multiples of kPlainSlots.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Add(const Simt& simt, float scale2, int token, int num_tokens,
                               bool is_plain, int used_slots, const float* references,
                               const int* limits, uint32_t ends, const float (&logits)[kSlots / 2],
                               const ColumnTarget** target) {
    const int first_column = (simt.lane() & 3) * 2;
    references += first_column;
    limits += first_column;
    if (is_plain) {
      // Long stretches without a branch: exponentials are queued while others are on their way.
      KEEPSET_UNROLL
      for (int slot = 0; slot < kSlots; slot += kPlainSlots) {
        if (slot >= used_slots) break;
        AddPlain(simt, scale2, references + slot, logits, slot / kSlotGroup);
        if (((ends >> (slot / kSlotGroup + kPlainSlots / kSlotGroup - 1)) & 1u) != 0) {
          Store(simt, token, num_tokens, **target);
          ++*target;
        }
      }
      return;
    }
    KEEPSET_UNROLL
    for (int group = 0; group < kSlots / kSlotGroup; ++group) {
      if (group * kSlotGroup >= used_slots) break;
      AddGroup(simt, scale2, token, references + group * kSlotGroup, limits + group * kSlotGroup,
               (*target)->is_max != 0, logits, group);
      if (((ends >> group) & 1u) != 0) {
        Store(simt, token, num_tokens, **target);
        ++*target;
      }
    }
  }

  // Whether a value of the tile's token r has to be looked into; forgets it.
  KEEPSET_KERNEL_BODY bool TakeSuspicion(int r) {
    const bool is_suspect = checks_[r].IsSuspect();
    checks_[r].Clear();
    return is_suspect;
  }

 private:
  template <typename Simt>
  KEEPSET_KERNEL_BODY void AddPlain(const Simt& simt, float scale2, const float* references,
                                    const float (&logits)[kSlots / 2], int first_group) {
    KEEPSET_UNROLL
    for (int group = 0; group < kPlainSlots / kSlotGroup; ++group) {
      KEEPSET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float reference = references[group * kSlotGroup + i];
        KEEPSET_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float logit = logits[4 * (first_group + group) + 2 * r + i];
          checks_[r].SeeLogit(logit);
          columns_[r] += simt.Exp2(logit * scale2 - reference);
        }
      }
    }
  }

  template <typename Simt>
  KEEPSET_KERNEL_BODY void AddGroup(const Simt& simt, float scale2, int token,
                                    const float* references, const int* limits, bool is_max,
                                    const float (&logits)[kSlots / 2], int group) {
    KEEPSET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float reference = references[i];
      const int limit = limits[i];
      KEEPSET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float logit = logits[4 * group + 2 * r + i];
        checks_[r].SeeLogit(logit);
        float p = simt.Exp2(logit * scale2 - reference);
        if (token + 8 * r > limit) p = 0.0f;
        columns_[r] = is_max ? simt.Max(columns_[r], p) : columns_[r] + p;
      }
    }
  }

  // Joins the lanes that share tokens, and begins anew.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Store(const Simt& simt, int token, int num_tokens,
                                 const ColumnTarget& target) {
    KEEPSET_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float column = JoinLaneColumns<4>(simt, columns_[r], target.is_max != 0);
      checks_[r].SeeColumn(column);
      if ((simt.lane() & 3) == 0 && token + 8 * r < num_tokens) {
        target.out[token + 8 * r] = simt.Div(column, target.divisor);
      }
      columns_[r] = 0.0f;
    }
  }

  float columns_[2] = {0.0f, 0.0f};
  ColumnCheck checks_[2];
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_EPILOGUE_INL_H_
