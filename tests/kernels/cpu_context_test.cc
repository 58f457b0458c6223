#include "kernels/cpu/cpu_context.h"

#include <cstddef>
#include <cstdint>

#include "gtest/gtest.h"

namespace keepset::kernels::cpu {
namespace {

constexpr int64_t kSmallBytes = 1000;
constexpr int64_t kLargeBytes = (int64_t{17} << 20) + 3;

bool IsAligned(const void* data, uintptr_t alignment) {
  return reinterpret_cast<uintptr_t>(data) % alignment == 0;
}

TEST(AlignedBuffer, SmallMemoryStartsAtACacheLine) {
  AlignedBuffer buffer;
  ASSERT_TRUE(buffer.Reserve(kSmallBytes).ok());
  EXPECT_TRUE(IsAligned(buffer.as<std::byte>(), 64));
}

TEST(AlignedBuffer, LargeMemoryStartsAtAHugePage) {
  AlignedBuffer buffer;
  ASSERT_TRUE(buffer.Reserve(kLargeBytes).ok());
  EXPECT_TRUE(IsAligned(buffer.as<std::byte>(), uintptr_t{2} << 20));
}

TEST(AlignedBuffer, GrowsFromSmallToLargeMemoryThatIsWritableToItsLastByte) {
  AlignedBuffer buffer;
  ASSERT_TRUE(buffer.Reserve(kSmallBytes).ok());
  buffer.as<std::byte>()[kSmallBytes - 1] = std::byte{1};
  ASSERT_TRUE(buffer.Reserve(kLargeBytes).ok());
  buffer.as<std::byte>()[0] = std::byte{2};
  buffer.as<std::byte>()[kLargeBytes - 1] = std::byte{3};
  EXPECT_EQ(buffer.as<std::byte>()[0], std::byte{2});
  EXPECT_EQ(buffer.as<std::byte>()[kLargeBytes - 1], std::byte{3});
}

TEST(AlignedBuffer, KeepsItsMemoryWhenLessIsAskedFor) {
  AlignedBuffer buffer;
  ASSERT_TRUE(buffer.Reserve(kLargeBytes).ok());
  const std::byte* before = buffer.as<std::byte>();
  ASSERT_TRUE(buffer.Reserve(kSmallBytes).ok());
  EXPECT_EQ(buffer.as<std::byte>(), before);
}

}  // namespace
}  // namespace keepset::kernels::cpu
