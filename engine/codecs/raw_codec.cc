// raw: the rows as they are, contiguous [num_kv_heads, n, head_dim] behind a checked header.
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/codecs/kv_codec.h"

namespace keepset::engine {
namespace {

static_assert(std::endian::native == std::endian::little, "the header is little-endian");

// "KSRAW1" as a little-endian word; the last digit is the layout's version.
constexpr uint64_t kMagic = 0x00003157'4152534bULL;

// Little-endian, in this order; a multiple of 16 bytes, so that rows stay aligned.
struct Header {
  uint64_t magic = kMagic;
  uint64_t dtype = 0;
  int64_t num_kv_heads = 0;
  int64_t num_tokens = 0;
  int64_t head_dim = 0;
  uint64_t checksum = 0;  // of the rows
};
static_assert(sizeof(Header) == 48);

// FNV-1a: finds torn and flipped bytes, protects against nobody.
uint64_t Checksum(absl::Span<const std::byte> bytes) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const std::byte byte : bytes) {
    hash = (hash ^ static_cast<uint64_t>(byte)) * 0x100000001b3ULL;
  }
  return hash;
}

absl::StatusOr<int64_t> RowBytes(int64_t num_kv_heads, int64_t num_tokens, int64_t head_dim,
                                 kernels::DType dtype) {
  int64_t bytes = 0;
  int64_t with_header = 0;
  if (num_kv_heads < 1 || num_tokens < 1 || head_dim < 1 ||
      __builtin_mul_overflow(num_kv_heads, num_tokens, &bytes) ||
      __builtin_mul_overflow(bytes, head_dim, &bytes) ||
      __builtin_mul_overflow(bytes, kernels::DTypeBytes(dtype), &bytes) ||
      __builtin_add_overflow(bytes, int64_t{sizeof(Header)}, &with_header)) {
    return absl::InvalidArgumentError(
        absl::StrCat("codec raw: [", num_kv_heads, ", ", num_tokens, ", ", head_dim,
                     "], want positive dimensions whose bytes fit 63 bits"));
  }
  return bytes;
}

// Contiguous rows as a source or a destination.
template <typename View, typename Byte>
View Contiguous(Byte* data, int64_t size_bytes, const Header& header) {
  View view;
  view.data = data;
  view.size_bytes = size_bytes;
  view.dtype = static_cast<kernels::DType>(header.dtype);
  view.num_kv_heads = header.num_kv_heads;
  view.seq_len = header.num_tokens;
  view.head_dim = header.head_dim;
  view.head_stride = header.num_tokens * header.head_dim;
  view.token_stride = header.head_dim;
  return view;
}

absl::Status CopyRows(kernels::ComputeBackend& backend, kernels::OpContext& context,
                      const kernels::KvView& in, const kernels::MutableKvView& out) {
  std::vector<int32_t> all(in.seq_len);
  std::iota(all.begin(), all.end(), 0);
  const absl::Span<const int32_t> shared = all;
  return backend.GatherRows(context, in, absl::MakeConstSpan(&shared, 1), out);
}

class RawCodec final : public KvCodec {
 public:
  absl::string_view name() const override { return "raw"; }
  double max_relative_error() const override { return 0.0; }

  absl::StatusOr<int64_t> MaxEncodedBytes(int64_t num_kv_heads, int64_t num_tokens,
                                          int64_t head_dim, kernels::DType dtype) const override {
    KEEPSET_ASSIGN_OR_RETURN(const int64_t bytes,
                             RowBytes(num_kv_heads, num_tokens, head_dim, dtype));
    return bytes + int64_t{sizeof(Header)};
  }

  absl::StatusOr<std::vector<std::byte>> Encode(kernels::ComputeBackend& backend,
                                                kernels::OpContext& context,
                                                const kernels::KvView& in) const override {
    KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(in, "codec raw: input"));
    KEEPSET_ASSIGN_OR_RETURN(const int64_t row_bytes,
                             RowBytes(in.num_kv_heads, in.seq_len, in.head_dim, in.dtype));
    Header header;
    header.dtype = static_cast<uint64_t>(in.dtype);
    header.num_kv_heads = in.num_kv_heads;
    header.num_tokens = in.seq_len;
    header.head_dim = in.head_dim;
    std::vector<std::byte> encoded(sizeof(Header) + row_bytes);
    std::byte* const rows = encoded.data() + sizeof(Header);
    KEEPSET_RETURN_IF_ERROR(CopyRows(backend, context, in,
                                     Contiguous<kernels::MutableKvView>(rows, row_bytes, header)));
    header.checksum = Checksum(absl::MakeConstSpan(rows, static_cast<size_t>(row_bytes)));
    std::memcpy(encoded.data(), &header, sizeof(header));
    return encoded;
  }

  absl::StatusOr<int64_t> Decode(kernels::ComputeBackend& backend, kernels::OpContext& context,
                                 absl::Span<const std::byte> encoded,
                                 const kernels::MutableKvView& out) const override {
    Header header;
    if (encoded.size() < sizeof(header)) {
      return absl::InvalidArgumentError(
          absl::StrCat("codec raw: ", encoded.size(), " bytes, want a header of ", sizeof(header)));
    }
    std::memcpy(&header, encoded.data(), sizeof(header));
    if (header.magic != kMagic) {
      return absl::InvalidArgumentError("codec raw: the bytes do not begin with KSRAW1");
    }
    if (header.dtype != static_cast<uint64_t>(out.dtype) ||
        header.num_kv_heads != out.num_kv_heads || header.head_dim != out.head_dim ||
        header.num_tokens > out.seq_len) {
      return absl::InvalidArgumentError(absl::StrCat(
          "codec raw: encoded dtype ", header.dtype, " [", header.num_kv_heads, ", ",
          header.num_tokens, ", ", header.head_dim, "], want dtype ", static_cast<int>(out.dtype),
          " [", out.num_kv_heads, ", at most ", out.seq_len, ", ", out.head_dim, "]"));
    }
    KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(out, "codec raw: destination"));
    KEEPSET_ASSIGN_OR_RETURN(
        const int64_t row_bytes,
        RowBytes(header.num_kv_heads, header.num_tokens, header.head_dim, out.dtype));
    const absl::Span<const std::byte> rows = encoded.subspan(sizeof(header));
    if (static_cast<int64_t>(rows.size()) != row_bytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("codec raw: ", rows.size(), " bytes of rows, want ", row_bytes));
    }
    if (Checksum(rows) != header.checksum) {
      return absl::InvalidArgumentError("codec raw: the rows do not match their checksum");
    }
    // Rows inside a larger message may lie at any address; views want their element's alignment.
    std::vector<std::byte> aligned;
    const std::byte* from = rows.data();
    if (reinterpret_cast<uintptr_t>(from) % kernels::DTypeBytes(out.dtype) != 0) {
      aligned.assign(rows.begin(), rows.end());
      from = aligned.data();
    }
    KEEPSET_RETURN_IF_ERROR(
        CopyRows(backend, context, Contiguous<kernels::KvView>(from, row_bytes, header), out));
    return header.num_tokens;
  }
};

}  // namespace

std::unique_ptr<KvCodec> NewRawCodec() { return std::make_unique<RawCodec>(); }

}  // namespace keepset::engine
