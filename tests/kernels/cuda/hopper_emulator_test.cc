// The emulator of Hopper's instructions against plain loops, and what it does not let pass.
#include "tests/kernels/cuda/hopper_emulator.h"

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/element.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_map.h"
#include "tests/kernels/cuda/emulated_runtime.h"
#include "tests/kernels/cuda/simt_emulator.h"

namespace keepset::kernels::cuda {
namespace {

constexpr int kChannels = 64;
constexpr int kRows = 64;
constexpr int kTileBytes = kRows * kChannels * 2;
// Descriptor of rows of 128 bytes in the 128-byte swizzle, without its start address: groups of
// eight rows 1024 bytes apart.
constexpr uint64_t kRowsOf128 = (uint64_t{1} << 62) | (uint64_t{64} << 32);

using Thread = EmulatedHopperThread;

// One warp group; shared memory for two tiles and a barrier.
void RunGroup(const std::function<void(const Thread& simt, std::byte* shared)>& body) {
  LaunchShape shape;
  shape.threads = 128;
  shape.shared_bytes = 1024 + 2 * kTileBytes + 64;
  EmulateGrid(shape, [&](const EmulatedThread& thread) {
    const Thread simt(thread);
    std::byte* const start = simt.shared();
    body(simt, start + (1024 - simt.SharedAddress(start) % 1024) % 1024);
  });
}

uint64_t* BarrierOf(std::byte* shared) {
  return reinterpret_cast<uint64_t*>(shared + 2 * kTileBytes);
}

void SetUpBarrier(const Thread& simt, std::byte* shared, int arrivals = 1) {
  if (simt.thread() == 0) {
    simt.InitBarrier(BarrierOf(shared), arrivals);
    simt.FenceBarriers();
  }
  simt.SyncBlock();
}

// [heads, tokens, channels] in memory, and its map with a box of one head.
class Keys {
 public:
  Keys(int heads, int tokens, int channels, int box_tokens)
      : tokens_(tokens), channels_(channels), memory_(heads * tokens * channels * 2 + 16) {
    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    for (int i = 0; i < heads * tokens * channels; ++i) {
      const auto bits = static_cast<uint16_t>(BitsOfFloat(normal(rng)) >> 16);
      std::memcpy(data() + i * 2, &bits, sizeof(bits));
    }
    SetEmulatedDevice(EmulatedDevice::kSm90);
    TensorMapSpec spec;
    spec.data = data();
    spec.rank = 3;
    const auto row_bytes = static_cast<uint64_t>(channels) * 2;
    spec.dims[0] = static_cast<uint64_t>(channels);
    spec.dims[1] = static_cast<uint64_t>(tokens);
    spec.dims[2] = static_cast<uint64_t>(heads);
    spec.stride_bytes[1] = row_bytes;
    spec.stride_bytes[2] = row_bytes * static_cast<uint64_t>(tokens);
    spec.box[0] = kChannels;
    spec.box[1] = static_cast<uint32_t>(box_tokens);
    spec.box[2] = 1;
    status_ = EncodeTensorMap(*FindTensorMapEncoder(), spec, &map_);
    SetEmulatedDevice(EmulatedDevice::kSm86);
  }

  const absl::Status& status() const { return status_; }
  const CUtensorMap& map() const { return map_; }
  // 0 outside.
  float At(int head, int token, int channel) const {
    if (token >= tokens_ || channel >= channels_) return 0.0f;
    uint16_t bits;
    std::memcpy(&bits, data() + ((head * tokens_ + token) * channels_ + channel) * 2, 2);
    return BfloatBitsToFloat(bits);
  }

 private:
  std::byte* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return const_cast<std::byte*>(memory_.data()) + (16 - address % 16) % 16;
  }

  int tokens_;
  int channels_;
  std::vector<std::byte> memory_;
  CUtensorMap map_;
  absl::Status status_;
};

// A box into `to`, waited for by the group.
void Load(const Thread& simt, std::byte* shared, const Keys& keys, std::byte* to, int channel,
          int token, int head, uint32_t parity) {
  if (simt.thread() == 0) {
    simt.ArriveAndExpect(BarrierOf(shared), kTileBytes);
    simt.LoadBox(to, keys.map(), channel, token, head, BarrierOf(shared));
  }
  simt.WaitPhase(BarrierOf(shared), parity);
  // Two phases later the parity is the same again.
  simt.SyncBlock();
}

void LoadBoth(const Thread& simt, std::byte* shared, const Keys& keys) {
  SetUpBarrier(simt, shared);
  Load(simt, shared, keys, shared, 0, 0, 0, 0);
  Load(simt, shared, keys, shared + kTileBytes, 0, 0, 1, 1);
}

uint64_t Descriptor(const Thread& simt, const std::byte* rows) {
  return kRowsOf128 | (simt.SharedAddress(rows) >> 4);
}

TEST(HopperDescriptor, NoSwizzleCountsMatricesOfEightRows) {
  // Start 4096, 128 bytes between matrices of a row, 512 between groups of rows.
  const uint64_t descriptor = (4096 >> 4) | (uint64_t{128 >> 4} << 16) | (uint64_t{512 >> 4} << 32);
  EXPECT_EQ(OperandAddress(descriptor, 0, 0), 4096u);
  EXPECT_EQ(OperandAddress(descriptor, 1, 3), 4096u + 16 + 6);
  EXPECT_EQ(OperandAddress(descriptor, 0, 8), 4096u + 128);
  EXPECT_EQ(OperandAddress(descriptor, 9, 15), 4096u + 512 + 128 + 16 + 14);
}

TEST(HopperDescriptor, Swizzle128MovesPiecesByTheRow) {
  const uint64_t descriptor = kRowsOf128 | (8192 >> 4);
  EXPECT_EQ(OperandAddress(descriptor, 0, 0), 8192u);
  EXPECT_EQ(OperandAddress(descriptor, 1, 0), 8192u + 128 + 16);
  EXPECT_EQ(OperandAddress(descriptor, 5, 8), 8192u + 5 * 128 + (1 ^ 5) * 16);
  EXPECT_EQ(OperandAddress(descriptor, 10, 3), 8192u + 1024 + 2 * 128 + 2 * 16 + 6);
  // The next 16 channels: the start moves by 32 bytes, the pattern does not.
  EXPECT_EQ(OperandAddress(descriptor + 2, 5, 0), 8192u + 5 * 128 + (2 ^ 5) * 16);
}

TEST(HopperDescriptor, BaseOffsetMovesThePattern) {
  const uint64_t descriptor = kRowsOf128 | (uint64_t{3} << 49) | ((8192 + 3 * 128) >> 4);
  EXPECT_EQ(OperandAddress(descriptor, 0, 0), 8192u + 3 * 128);
  EXPECT_EQ(OperandAddress(descriptor, 1, 0), 8192u + 4 * 128 + 16);
}

TEST(HopperDescriptor, NarrowSwizzlesHaveNarrowRows) {
  const uint64_t by_64 = (uint64_t{2} << 62) | (uint64_t{512 >> 4} << 32) | (8192 >> 4);
  EXPECT_EQ(OperandAddress(by_64, 3, 0), 8192u + ((3 * 64) ^ 16));
  const uint64_t by_32 = (uint64_t{3} << 62) | (uint64_t{256 >> 4} << 32) | (8192 >> 4);
  EXPECT_EQ(OperandAddress(by_32, 5, 0), 8192u + ((5 * 32) ^ 16));
}

TEST(HopperDescriptor, ReservedBitsEndTheProgram) {
  EXPECT_DEATH(OperandAddress(uint64_t{1} << 14, 0, 0), "reserved bits");
}

TEST(HopperDescriptor, OperandWithinASwizzleEndsTheProgram) {
  EXPECT_DEATH(OperandAddress(kRowsOf128 | ((8192 + 3 * 128) >> 4), 0, 0), "begins within 1024");
}

TEST(HopperLoad, BoxIsSwizzledAndZeroOutside) {
  const Keys keys(2, 90, 72, kRows);
  ASSERT_TRUE(keys.status().ok()) << keys.status();
  RunGroup([&](const Thread& simt, std::byte* shared) {
    SetUpBarrier(simt, shared);
    Load(simt, shared, keys, shared, 64, 64, 1, 0);
    if (simt.thread() != 0) return;
    for (int row = 0; row < kRows; ++row) {
      for (int channel = 0; channel < kChannels; ++channel) {
        const int piece = (channel / 8) ^ (row % 8);
        uint16_t bits;
        std::memcpy(&bits, shared + row * 128 + piece * 16 + channel % 8 * 2, 2);
        ASSERT_EQ(BfloatBitsToFloat(bits), keys.At(1, 64 + row, 64 + channel))
            << row << " " << channel;
      }
    }
  });
}

TEST(HopperProduct, OfTwoTilesMatchesPlainLoops) {
  const Keys keys(2, kRows, kChannels, kRows);
  RunGroup([&](const Thread& simt, std::byte* shared) {
    LoadBoth(simt, shared, keys);
    const uint64_t a = Descriptor(simt, shared);
    const uint64_t b = Descriptor(simt, shared + kTileBytes);
    float d[32];
    simt.FenceMma(d);
    for (int step = 0; step < 4; ++step) {
      simt.MmaAsync<DType::kBF16, 64>(d, a + 2 * step, b + 2 * step, step > 0);
    }
    simt.CommitMma();
    EXPECT_NE(d[0], d[0]);
    simt.WaitMma(d);
    for (int i = 0; i < 32; ++i) {
      const int row = simt.warp() * 16 + simt.lane() / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + simt.lane() % 4 * 2 + i % 2;
      double want = 0.0;
      for (int k = 0; k < kChannels; ++k) want += keys.At(0, row, k) * keys.At(1, column, k);
      ASSERT_NEAR(d[i], want, 1e-4) << row << " " << column;
    }
  });
}

// What ends the program.

void Multiply(const Thread& simt, const std::byte* a, const std::byte* b, float (&d)[32]) {
  simt.FenceMma(d);
  simt.MmaAsync<DType::kBF16, 64>(d, Descriptor(simt, a), Descriptor(simt, b), false);
  simt.CommitMma();
}

TEST(HopperStrictness, OperandThatIsStillOnItsWay) {
  const Keys keys(2, kRows, kChannels, kRows);
  const auto multiply_at_once = [&](const Thread& simt, std::byte* shared) {
    SetUpBarrier(simt, shared);
    if (simt.thread() == 0) {
      simt.ArriveAndExpect(BarrierOf(shared), kTileBytes);
      simt.LoadBox(shared, keys.map(), 0, 0, 0, BarrierOf(shared));
    }
    float d[32];
    Multiply(simt, shared, shared, d);
    simt.WaitMma(d);
  };
  // In some orders the load is early enough.
  const auto in_many_orders = [&] {
    for (uint32_t seed = 1; seed <= 30; ++seed) {
      SetEmulationSeed(seed);
      RunGroup(multiply_at_once);
    }
  };
  EXPECT_DEATH(in_many_orders(), "operand that is still on its way");
}

TEST(HopperStrictness, StageOverwrittenBeforeItsProductIsWaitedFor) {
  const Keys keys(2, kRows, kChannels, kRows);
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 LoadBoth(simt, shared, keys);
                 float d[32];
                 Multiply(simt, shared, shared + kTileBytes, d);
                 simt.SyncBlock();
                 Load(simt, shared, keys, shared, 0, 0, 0, 0);
                 simt.WaitMma(d);
               }),
               "load over an operand that is not waited for");
}

TEST(HopperStrictness, CopiedRowsWithoutAFence) {
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 SetUpBarrier(simt, shared);
                 simt.CopyAsync16(shared + simt.thread() * 16, shared, false);
                 simt.CommitCopies();
                 simt.WaitCopies<0>();
                 simt.SyncBlock();
                 float d[32];
                 Multiply(simt, shared, shared, d);
               }),
               "copied and not fenced");
}

TEST(HopperStrictness, AccumulatorTouchedBeforeTheWait) {
  const Keys keys(2, kRows, kChannels, kRows);
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 LoadBoth(simt, shared, keys);
                 float d[32];
                 Multiply(simt, shared, shared + kTileBytes, d);
                 d[7] = 0.0f;
                 simt.WaitMma(d);
               }),
               "accumulator touched");
}

TEST(HopperStrictness, ProductWithoutAFence) {
  const Keys keys(2, kRows, kChannels, kRows);
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 LoadBoth(simt, shared, keys);
                 float d[32];
                 simt.MmaAsync<DType::kBF16, 64>(d, Descriptor(simt, shared),
                                                 Descriptor(simt, shared), false);
               }),
               "product without a fence");
}

TEST(HopperStrictness, WarpsOfAGroupWithDifferentProducts) {
  const Keys keys(2, kRows, kChannels, kRows);
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 LoadBoth(simt, shared, keys);
                 float d[32];
                 Multiply(simt, shared + (simt.warp() == 2 ? kTileBytes : 0), shared, d);
                 simt.WaitMma(d);
               }),
               "different products");
}

TEST(HopperStrictness, ArrivalTooMany) {
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 SetUpBarrier(simt, shared, 2);
                 if (simt.thread() < 3) simt.ArriveAndExpect(BarrierOf(shared), 16);
               }),
               "more arrivals than the phase has");
}

TEST(HopperStrictness, PhaseThatNeverEnds) {
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 SetUpBarrier(simt, shared);
                 simt.WaitPhase(BarrierOf(shared), 0);
               }),
               "");
}

TEST(HopperStrictness, FewerBytesThanExpected) {
  const Keys keys(2, kRows, kChannels, kRows);
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 SetUpBarrier(simt, shared);
                 if (simt.thread() != 0) return;
                 simt.ArriveAndExpect(BarrierOf(shared), kTileBytes + 16);
                 simt.LoadBox(shared, keys.map(), 0, 0, 0, BarrierOf(shared));
               }),
               "left at the end of the block");
}

TEST(HopperStrictness, MoreBytesThanExpected) {
  const Keys keys(2, kRows, kChannels, kRows);
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 SetUpBarrier(simt, shared);
                 Load(simt, shared, keys, shared, 0, 0, 0, 0);
                 if (simt.thread() == 0) {
                   simt.LoadBox(shared, keys.map(), 0, 0, 0, BarrierOf(shared));
                   simt.ArriveAndExpect(BarrierOf(shared), 16);
                 }
                 simt.WaitPhase(BarrierOf(shared), 1);
               }),
               "");
}

TEST(HopperStrictness, BarrierWithoutItsFence) {
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* shared) {
                 if (simt.thread() == 0) simt.InitBarrier(BarrierOf(shared), 1);
                 simt.SyncBlock();
                 simt.WaitPhase(BarrierOf(shared), 1);
               }),
               "not fenced after its set-up");
}

TEST(HopperStrictness, ThreadThatComesTwiceToANamedBarrier) {
  EXPECT_DEATH(RunGroup([&](const Thread& simt, std::byte* /*shared*/) {
                 simt.ArriveNamed(1, 256);
                 simt.ArriveNamed(1, 256);
               }),
               "comes twice");
}

TEST(HopperStrictness, MoreRegistersThanThereAre) {
  LaunchShape shape;
  shape.threads = 384;
  EXPECT_DEATH(EmulateGrid(shape,
                           [](const EmulatedThread& thread) {
                             const Thread simt(thread);
                             if (simt.warp() < 4) {
                               simt.ShrinkRegisters<40>();
                             } else {
                               simt.GrowRegisters<240>();
                             }
                           }),
               "more registers");
}

TEST(HopperStrictness, RegistersThatNobodyGaveBack) {
  LaunchShape shape;
  shape.threads = 384;
  EXPECT_DEATH(EmulateGrid(shape,
                           [](const EmulatedThread& thread) {
                             const Thread simt(thread);
                             if (simt.warp() >= 4) simt.GrowRegisters<216>();
                           }),
               "more registers");
}

TEST(HopperTensorMap, StridesOfTheDriversManual) {
  TensorMapSpec spec;
  alignas(64) static std::byte memory[1024];
  SetEmulatedDevice(EmulatedDevice::kSm90);
  const TensorMapEncoder encoder = *FindTensorMapEncoder();
  SetEmulatedDevice(EmulatedDevice::kSm86);
  spec.data = memory;
  spec.rank = 3;
  for (int i = 0; i < 3; ++i) spec.dims[i] = 4;
  spec.dims[0] = 64;
  spec.stride_bytes[1] = 128;
  spec.stride_bytes[2] = 512;
  spec.box[0] = 64;
  spec.box[1] = spec.box[2] = 1;
  CUtensorMap map;
  EXPECT_TRUE(EncodeTensorMap(encoder, spec, &map).ok());
  TensorMapSpec odd = spec;
  odd.stride_bytes[1] = 136;
  EXPECT_FALSE(EncodeTensorMap(encoder, odd, &map).ok());
  TensorMapSpec wide = spec;
  wide.box[0] = 128;
  EXPECT_FALSE(EncodeTensorMap(encoder, wide, &map).ok());
}

}  // namespace
}  // namespace keepset::kernels::cuda
