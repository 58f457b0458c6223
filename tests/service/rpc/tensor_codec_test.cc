#include "service/rpc/tensor_codec.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>

namespace keepset::service {
namespace {

class SmallRegion final : public MappedRegion {
 public:
  std::byte* data() const override { return bytes_.data(); }
  int64_t size_bytes() const override { return static_cast<int64_t>(bytes_.size()); }
  RegionAccess access() const override { return RegionAccess::kReadWrite; }
  absl::Status Verify() const override { return absl::OkStatus(); }

 private:
  alignas(8) mutable std::array<std::byte, 256> bytes_ = {};
};

class OneRegion final : public RegionSource {
 public:
  absl::StatusOr<const MappedRegion*> Find(absl::string_view /*region_id*/) override {
    return &region_;
  }

 private:
  const SmallRegion region_;
};

v1::KvTensor WholeRegion() {
  v1::KvTensor wire;
  wire.set_dtype(v1::DTYPE_F32);
  wire.mutable_data()->mutable_region()->set_region_id("r");
  wire.mutable_data()->mutable_region()->set_length(256);
  return wire;
}

TEST(DecodeDestination, StridesOfOneHeadAreFilledIn) {
  OneRegion regions;
  v1::KvTensor wire = WholeRegion();
  wire.set_token_stride(16);
  const auto view =
      DecodeDestination(wire, {1, 4, 8}, kernels::DType::kF32, "destination.k", regions);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->head_stride, 64);
}

TEST(DecodeDestination, StridesBeyond64BitsAreRefused) {
  OneRegion regions;
  v1::KvTensor wire = WholeRegion();
  wire.set_token_stride(uint64_t{1} << 40);
  const auto view = DecodeDestination(wire, {1, 2147483647, 8}, kernels::DType::kF32,
                                      "layer 0: destination.k", regions);
  EXPECT_EQ(
      view.status().message(),
      "layer 0: destination.k: token_stride=1099511627776 of 2147483647 tokens, want it inside "
      "the tensor");
}

}  // namespace
}  // namespace keepset::service
