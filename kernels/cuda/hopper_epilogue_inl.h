// What HopperColumns does with a product: powers, sums over query rows, and the rows of the result.
#ifndef KEEPSET_KERNELS_CUDA_HOPPER_EPILOGUE_INL_H_
#define KEEPSET_KERNELS_CUDA_HOPPER_EPILOGUE_INL_H_

#include <cstdint>

#include "kernels/cuda/column_inl.h"
#include "kernels/cuda/hopper_pipeline_inl.h"
#include "kernels/cuda/host_device.h"

namespace keepset::kernels::cuda {

// Sums that are joined over lanes together: one for each of the four lanes that share tokens.
constexpr int kJoinedSums = 4;
// Slots between two places where most outputs end: a product has whole multiples of kJoinedSums.
template <int kSlots>
constexpr int kCoarseSlots = kSlots / kJoinedSums < 32 ? kSlots / kJoinedSums : 32;

enum class ColumnKind {
  kCoarse,  // no token is masked, no output a maximum, and outputs end at kCoarseSlots
  kFine,    // the same, and outputs end at multiples of kSlotGroup
  kMasked,  // sums and maxima over the rows that see a token
};

// How the outputs of a part are summed where no token is masked. ends: [products].
template <int kSlots>
KEEPSET_KERNEL_BODY inline ColumnKind KindOfPart(const ColumnTarget* targets, int num_outputs,
                                                 const uint32_t* ends, int products) {
  uint32_t coarse = 0;
  KEEPSET_UNROLL
  for (int slot = kCoarseSlots<kSlots>; slot <= kSlots; slot += kCoarseSlots<kSlots>) {
    coarse |= 1u << (slot / kSlotGroup - 1);
  }
  for (int j = 0; j < num_outputs; ++j) {
    if (targets[j].is_max != 0) return ColumnKind::kMasked;
  }
  for (int j = 0; j < products; ++j) {
    if ((ends[j] & ~coarse) != 0) return ColumnKind::kFine;
  }
  return ColumnKind::kCoarse;
}

// What a thread adds up: two tokens, 8 rows of the tile apart. A column is added up slot after slot
// whatever the kind, so that it has the same bits in any company.
template <int kSlots>
class ColumnEpilogue {
 public:
  // One product: `logits` of slots first_slot to first_slot + kSlots. `target` is that of the
  // output that the first slot belongs to.
  template <typename Simt>
  KEEPSET_KERNEL_BODY void Add(const Simt& simt, float scale2, int token, int num_tokens,
                               ColumnKind kind, int used_slots, const float* references,
                               const int* limits, uint32_t ends, const float (&logits)[kSlots / 2],
                               const ColumnTarget** target) {
    const Slots slots = {scale2, token, num_tokens, used_slots, references, limits, ends};
    if (kind == ColumnKind::kCoarse) {
      AddSlots<kCoarseSlots<kSlots>, ColumnKind::kCoarse>(simt, slots, logits, target);
    } else if (kind == ColumnKind::kFine) {
      AddSlots<kSlotGroup, ColumnKind::kFine>(simt, slots, logits, target);
    } else {
      AddSlots<kSlotGroup, ColumnKind::kMasked>(simt, slots, logits, target);
    }
  }

  // Whether a value of the tile's token r has to be looked into; forgets it. One of the lanes that
  // share the token says so.
  KEEPSET_KERNEL_BODY bool TakeSuspicion(int r) {
    const bool is_suspect = checks_[r].IsSuspect();
    checks_[r].Clear();
    return is_suspect;
  }

 private:
  struct Slots {
    float scale2;
    int token;
    int num_tokens;
    int used;
    const float* references;
    const int* limits;
    uint32_t ends;
  };
  // Of two neighbouring slots.
  template <typename Value>
  struct alignas(8) Pair {
    Value of[2];
  };
  template <typename Value>
  KEEPSET_KERNEL_BODY static Pair<Value> LoadPair(const Value* values, int slot) {
    return *reinterpret_cast<const Pair<Value>*>(values + slot);
  }

  // Stretches of kEvery slots, at the end of which an output may end.
  template <int kEvery, ColumnKind kKind, typename Simt>
  KEEPSET_KERNEL_BODY void AddSlots(const Simt& simt, const Slots& slots,
                                    const float (&logits)[kSlots / 2],
                                    const ColumnTarget** target) {
    KEEPSET_UNROLL
    for (int first = 0; first < kSlots; first += kJoinedSums * kEvery) {
      if (first >= slots.used) break;
      const ColumnTarget* const first_target = *target;
      float sums[kJoinedSums][2];
      uint32_t ended = 0;  // bit per sum
      uint32_t maxima = 0;
      KEEPSET_UNROLL
      for (int i = 0; i < kJoinedSums; ++i) {
        const int slot = first + i * kEvery;
        if (slot < slots.used) {
          const bool is_max = kKind == ColumnKind::kMasked && (*target)->is_max != 0;
          maxima |= (is_max ? 1u : 0u) << i;
          KEEPSET_UNROLL
          for (int group = 0; group < kEvery / kSlotGroup; ++group) {
            AddGroup<kKind>(simt, slots, is_max, logits, slot / kSlotGroup + group);
          }
        }
        const bool is_end = ((slots.ends >> ((slot + kEvery) / kSlotGroup - 1)) & 1u) != 0;
        ended |= (is_end ? 1u : 0u) << i;
        *target += is_end ? 1 : 0;
        KEEPSET_UNROLL
        for (int r = 0; r < 2; ++r) {
          sums[i][r] = columns_[r];
          columns_[r] = is_end ? 0.0f : columns_[r];
        }
      }
      if (ended != 0) {
        Store<kKind>(simt, slots.token, slots.num_tokens, ended, maxima, first_target, sums);
      }
    }
  }

  template <ColumnKind kKind, typename Simt>
  KEEPSET_KERNEL_BODY void AddGroup(const Simt& simt, const Slots& slots, bool is_max,
                                    const float (&logits)[kSlots / 2], int group) {
    const int slot = group * kSlotGroup + (simt.lane() & 3) * 2;
    const Pair<float> references = LoadPair(slots.references, slot);
    Pair<int> limits = {};
    if constexpr (kKind == ColumnKind::kMasked) limits = LoadPair(slots.limits, slot);
    KEEPSET_UNROLL
    for (int i = 0; i < 2; ++i) {
      KEEPSET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float logit = logits[4 * group + 2 * r + i];
        checks_[r].SeeLogit(logit);
        float p = simt.Exp2(logit * slots.scale2 - references.of[i]);
        if constexpr (kKind == ColumnKind::kMasked) {
          if (slots.token + 8 * r > limits.of[i]) p = 0.0f;
          if (is_max) {
            columns_[r] = simt.Max(columns_[r], p);
            continue;
          }
        }
        columns_[r] += p;
      }
    }
  }

  // Joins the lanes that share tokens and stores the sums that have ended; first_target: of the
  // first of them. Each lane comes to hold one of the sums, of both tokens.
  template <ColumnKind kKind, typename Simt>
  KEEPSET_KERNEL_BODY void Store(const Simt& simt, int token, int num_tokens, uint32_t ended,
                                 uint32_t maxima, const ColumnTarget* first_target,
                                 const float (&sums)[kJoinedSums][2]) {
    static_assert(kJoinedSums == 4);
    const int held = simt.lane() & 3;
    const auto join = [&](float kept, float given, int mask, int sum) {
      const float other = simt.ShuffleXor(given, mask);
      if (kKind == ColumnKind::kMasked && ((maxima >> sum) & 1u) != 0) return simt.Max(kept, other);
      return kept + other;
    };
    const bool is_odd = (held & 1) != 0;
    const bool is_upper = (held & 2) != 0;
    float columns[2];
    KEEPSET_UNROLL
    for (int r = 0; r < 2; ++r) {
      float pairs[2];
      KEEPSET_UNROLL
      for (int i = 0; i < 2; ++i) {
        pairs[i] = join(is_odd ? sums[2 * i + 1][r] : sums[2 * i][r],
                        is_odd ? sums[2 * i][r] : sums[2 * i + 1][r], 1, 2 * i + (held & 1));
      }
      columns[r] = join(is_upper ? pairs[1] : pairs[0], is_upper ? pairs[0] : pairs[1], 2, held);
    }
    if (((ended >> held) & 1u) == 0) return;
    const uint32_t before = ended & ((1u << held) - 1u);
    const ColumnTarget target =
        first_target[(before & 1u) + ((before >> 1) & 1u) + ((before >> 2) & 1u)];
    KEEPSET_UNROLL
    for (int r = 0; r < 2; ++r) {
      checks_[r].SeeColumn(columns[r]);
      columns[r] = simt.Div(columns[r], target.divisor);
    }
    KEEPSET_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (token + 8 * r < num_tokens) simt.StoreGlobal(target.out + token + 8 * r, columns[r]);
    }
  }

  float columns_[2] = {0.0f, 0.0f};
  ColumnCheck checks_[2];
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_HOPPER_EPILOGUE_INL_H_
