// What every listed codec promises (engine/codecs/kv_codec.h). A new line in codecs.def is covered
// without a change here.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "engine/codecs/codec_registry.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::engine {
namespace {

using Case = std::tuple<std::string, kernels::DType, fakes::KvLayout>;

class KvCodecConformance : public ::testing::TestWithParam<Case> {
 protected:
  KvCodecConformance() : prompt_(Shape()) {
    backend_ = *kernels::NewBackend("cpu", {.num_threads = 1});
    context_ = *backend_->NewContext();
    codec_ = *NewCodec(std::get<0>(GetParam()));
  }

  static fakes::PromptShape Shape() {
    fakes::PromptShape shape;
    shape.num_layers = 1;
    shape.seq_len = 37;
    shape.dtype = std::get<1>(GetParam());
    shape.layout = std::get<2>(GetParam());
    return shape;
  }

  kernels::KvView Source() const { return prompt_.observation(0).k; }

  std::vector<std::byte> Encoded() {
    auto encoded = codec_->Encode(*backend_, *context_, Source());
    EXPECT_TRUE(encoded.ok()) << encoded.status();
    return encoded.ok() ? *std::move(encoded) : std::vector<std::byte>{};
  }

  // Contiguous, of `capacity` rows a head, filled with 0x5a.
  kernels::MutableKvView Destination(int64_t capacity) {
    const fakes::PromptShape shape = Shape();
    decoded_.assign(
        shape.num_kv_heads * capacity * shape.head_dim * kernels::DTypeBytes(shape.dtype),
        std::byte{0x5a});
    kernels::MutableKvView out;
    out.data = decoded_.data();
    out.size_bytes = static_cast<int64_t>(decoded_.size());
    out.dtype = shape.dtype;
    out.num_kv_heads = shape.num_kv_heads;
    out.seq_len = capacity;
    out.head_dim = shape.head_dim;
    out.head_stride = capacity * shape.head_dim;
    out.token_stride = shape.head_dim;
    return out;
  }

  bool DestinationIsUntouched() const {
    return std::all_of(decoded_.begin(), decoded_.end(),
                       [](std::byte byte) { return byte == std::byte{0x5a}; });
  }

  fakes::SyntheticPrompt prompt_;
  std::unique_ptr<kernels::ComputeBackend> backend_;
  std::unique_ptr<kernels::OpContext> context_;
  std::unique_ptr<KvCodec> codec_;
  std::vector<std::byte> decoded_;
};

TEST_P(KvCodecConformance, RoundTripStaysWithinTheStatedError) {
  const auto decoded =
      codec_->Decode(*backend_, *context_, Encoded(), Destination(Shape().seq_len));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(*decoded, Shape().seq_len);
  // Read back through a prompt of the same shape whose K is the decoded bytes.
  fakes::PromptShape shape = Shape();
  shape.layout = fakes::KvLayout::kHnd;
  fakes::SyntheticPrompt copy(shape);
  std::memcpy(const_cast<std::byte*>(copy.observation(0).k.data), decoded_.data(), decoded_.size());
  for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
    for (int64_t t = 0; t < shape.seq_len; ++t) {
      double largest = 0.0;
      for (int64_t c = 0; c < shape.head_dim; ++c) {
        largest = std::max(largest, std::abs(prompt_.k(0, head, t, c)));
      }
      for (int64_t c = 0; c < shape.head_dim; ++c) {
        EXPECT_LE(std::abs(copy.k(0, head, t, c) - prompt_.k(0, head, t, c)),
                  codec_->max_relative_error() * largest);
      }
    }
  }
}

TEST_P(KvCodecConformance, EncodedBytesStayWithinTheBound) {
  const fakes::PromptShape shape = Shape();
  const auto bound =
      codec_->MaxEncodedBytes(shape.num_kv_heads, shape.seq_len, shape.head_dim, shape.dtype);
  ASSERT_TRUE(bound.ok());
  EXPECT_LE(static_cast<int64_t>(Encoded().size()), *bound);
}

TEST_P(KvCodecConformance, BoundOfHugeShapesIsRefusedNotOverflowed) {
  const int64_t huge = int64_t{1} << 40;
  EXPECT_EQ(codec_->MaxEncodedBytes(huge, huge, huge, Shape().dtype).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_P(KvCodecConformance, TornBytesAreRefusedAndNothingIsWritten) {
  const std::vector<std::byte> encoded = Encoded();
  const kernels::MutableKvView out = Destination(Shape().seq_len);
  for (size_t size = 0; size < encoded.size(); size += size < 64 ? 1 : 97) {
    const auto decoded =
        codec_->Decode(*backend_, *context_, absl::MakeConstSpan(encoded.data(), size), out);
    EXPECT_EQ(decoded.status().code(), absl::StatusCode::kInvalidArgument) << size << " bytes";
  }
  EXPECT_TRUE(DestinationIsUntouched());
}

TEST_P(KvCodecConformance, FlippedBytesAreRefusedAndNothingIsWritten) {
  std::vector<std::byte> encoded = Encoded();
  const kernels::MutableKvView out = Destination(Shape().seq_len);
  for (size_t i = 0; i < encoded.size(); i += i < 64 ? 1 : 89) {
    encoded[i] ^= std::byte{0x80};
    EXPECT_EQ(codec_->Decode(*backend_, *context_, encoded, out).status().code(),
              absl::StatusCode::kInvalidArgument)
        << "byte " << i;
    encoded[i] ^= std::byte{0x80};
  }
  EXPECT_TRUE(DestinationIsUntouched());
}

TEST_P(KvCodecConformance, TooSmallADestinationIsRefused) {
  const auto decoded =
      codec_->Decode(*backend_, *context_, Encoded(), Destination(Shape().seq_len - 1));
  EXPECT_EQ(decoded.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(DestinationIsUntouched());
}

TEST_P(KvCodecConformance, UnalignedBytesDecode) {
  const std::vector<std::byte> encoded = Encoded();
  std::vector<std::byte> shifted(encoded.size() + 1);
  std::copy(encoded.begin(), encoded.end(), shifted.begin() + 1);
  EXPECT_TRUE(
      codec_->Decode(*backend_, *context_, absl::MakeConstSpan(shifted).subspan(1), Destination(64))
          .ok());
}

std::vector<Case> AllCases() {
  std::vector<Case> cases;
  for (const std::string& name : ListCodecs()) {
    for (const kernels::DType dtype :
         {kernels::DType::kF32, kernels::DType::kF16, kernels::DType::kBF16}) {
      for (const fakes::KvLayout layout :
           {fakes::KvLayout::kHnd, fakes::KvLayout::kNhd, fakes::KvLayout::kPaged}) {
        cases.emplace_back(name, dtype, layout);
      }
    }
  }
  return cases;
}

std::string CaseName(const ::testing::TestParamInfo<Case>& info) {
  constexpr const char* kLayouts[] = {"Hnd", "Nhd", "Paged"};
  return std::get<0>(info.param) + std::string(kernels::DTypeName(std::get<1>(info.param))) +
         kLayouts[static_cast<int>(std::get<2>(info.param))];
}

INSTANTIATE_TEST_SUITE_P(EveryCodec, KvCodecConformance, ::testing::ValuesIn(AllCases()), CaseName);

TEST(CodecRegistry, UnknownCodecListsTheKnownOnes) {
  EXPECT_EQ(NewCodec("zip").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(NewCodec("zip").status().message(), "unknown codec 'zip', known are raw");
}

}  // namespace
}  // namespace keepset::engine
