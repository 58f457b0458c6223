#include "service/rpc/tensor_codec.h"

#include <bit>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

// Elements: beyond any memory. Products with a count of tokens are checked.
constexpr uint64_t kMaxStride = uint64_t{1} << 40;

struct MutableBytes {
  std::byte* data = nullptr;
  int64_t size = 0;
};

absl::StatusOr<MutableBytes> FindSlice(const v1::RegionSlice& slice, int64_t element_bytes,
                                       absl::string_view where, RegionSource& regions,
                                       const MappedRegion** found) {
  KEEPSET_ASSIGN_OR_RETURN(const MappedRegion* region, regions.Find(slice.region_id()));
  const auto size = static_cast<uint64_t>(region->size_bytes());
  if (slice.length() == 0 || slice.offset() > size || slice.length() > size - slice.offset()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": slice offset=", slice.offset(), " length=", slice.length(),
                     ", want length >= 1 and offset + length <= ", size));
  }
  std::byte* data = region->data() + slice.offset();
  if (std::bit_cast<uintptr_t>(data) % element_bytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": slice offset=", slice.offset(),
                                                   ", want a multiple of ", element_bytes));
  }
  if (found != nullptr) *found = region;
  return MutableBytes{data, static_cast<int64_t>(slice.length())};
}

absl::StatusOr<ByteSource> FindBytes(const v1::TensorData& data, int64_t element_bytes,
                                     absl::string_view where, RegionSource& regions) {
  if (data.source_case() == v1::TensorData::kRegion) {
    KEEPSET_ASSIGN_OR_RETURN(const MutableBytes bytes,
                             FindSlice(data.region(), element_bytes, where, regions, nullptr));
    return ByteSource{bytes.data, bytes.size};
  }
  const std::string& bytes = data.inline_();
  if (bytes.empty()) return absl::InvalidArgumentError(absl::StrCat(where, ": no inline bytes"));
  // A std::string keeps its bytes at least pointer-aligned, in its own buffer and on the heap.
  if (std::bit_cast<uintptr_t>(bytes.data()) % element_bytes != 0) {
    return absl::InternalError(absl::StrCat(where, ": inline bytes are unaligned"));
  }
  return ByteSource{reinterpret_cast<const std::byte*>(bytes.data()),
                    static_cast<int64_t>(bytes.size())};
}

absl::StatusOr<int64_t> Stride(absl::string_view where, absl::string_view field, uint64_t value) {
  if (value > kMaxStride) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": ", field, "=", value, ", want at most ", kMaxStride));
  }
  return static_cast<int64_t>(value);
}

// Contiguous inline bytes hold exactly the tensor: anything else is a shape mistake of the caller.
absl::Status CheckContiguousInline(const v1::TensorData& data, int64_t bytes, int64_t want,
                                   absl::string_view where) {
  if (data.source_case() == v1::TensorData::kInline && bytes != want) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", bytes, " inline bytes, want ", want,
                                                   " for this shape and dtype"));
  }
  return absl::OkStatus();
}

// The stride of heads that lie one behind the other.
absl::StatusOr<int64_t> PackedHeadStride(int64_t tokens, int64_t token_stride,
                                         absl::string_view where) {
  int64_t stride = 0;
  if (!__builtin_mul_overflow(tokens, token_stride, &stride)) return stride;
  return absl::InvalidArgumentError(absl::StrCat(where, ": token_stride=", token_stride, " of ",
                                                 tokens, " tokens, want it inside the tensor"));
}

// Addressing shared by KvView and MutableKvView.
template <typename View>
absl::Status DecodeLayout(const v1::KvTensor& wire, const KvShape& shape,
                          absl::Span<const int32_t> block_table, absl::string_view where,
                          View& view) {
  view.num_kv_heads = shape.num_kv_heads;
  view.seq_len = shape.tokens;
  view.head_dim = shape.dim;
  KEEPSET_ASSIGN_OR_RETURN(view.head_stride, Stride(where, "head_stride", wire.head_stride()));
  KEEPSET_ASSIGN_OR_RETURN(view.token_stride, Stride(where, "token_stride", wire.token_stride()));
  KEEPSET_ASSIGN_OR_RETURN(view.block_size, Stride(where, "block_size", wire.block_size()));
  KEEPSET_ASSIGN_OR_RETURN(view.block_stride, Stride(where, "block_stride", wire.block_stride()));
  if (view.block_size == 0) {
    if (view.head_stride == 0 && view.token_stride == 0) {
      view.token_stride = shape.dim;
      view.head_stride = shape.tokens * shape.dim;
      return CheckContiguousInline(
          wire.data(), view.size_bytes,
          shape.num_kv_heads * view.head_stride * kernels::DTypeBytes(view.dtype), where);
    }
    if (view.token_stride == 0 || (view.head_stride == 0 && shape.num_kv_heads > 1)) {
      return absl::InvalidArgumentError(absl::StrCat(
          where, ": head_stride=", view.head_stride, " token_stride=", view.token_stride,
          ", want both, or neither for a contiguous tensor"));
    }
    if (view.head_stride == 0) {
      KEEPSET_ASSIGN_OR_RETURN(view.head_stride,
                               PackedHeadStride(shape.tokens, view.token_stride, where));
    }
    return absl::OkStatus();
  }
  if (view.token_stride == 0 || view.head_stride == 0 || view.block_stride == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": head_stride=", view.head_stride, " token_stride=", view.token_stride,
                     " block_stride=", view.block_stride, ", want all three with block_size"));
  }
  const int64_t num_blocks = (shape.tokens - 1) / view.block_size + 1;
  if (static_cast<int64_t>(block_table.size()) < num_blocks) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": block_table has ", block_table.size(),
                                                   " entries, want ", num_blocks, " for ",
                                                   shape.tokens, " tokens"));
  }
  view.block_table = block_table.first(num_blocks);
  return absl::OkStatus();
}

absl::Status FindWritable(const v1::TensorData& data, absl::string_view where,
                          RegionSource& regions, kernels::MutableKvView& view) {
  if (data.source_case() != v1::TensorData::kRegion) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": no region, want a slice of a read-write region"));
  }
  const MappedRegion* region = nullptr;
  KEEPSET_ASSIGN_OR_RETURN(
      const MutableBytes bytes,
      FindSlice(data.region(), kernels::DTypeBytes(view.dtype), where, regions, &region));
  if (region->access() != RegionAccess::kReadWrite) {
    return absl::FailedPreconditionError(
        absl::StrCat(where, ": the region is registered read-only, want read-write"));
  }
  view.data = bytes.data;
  view.size_bytes = bytes.size;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<kernels::DType> DecodeDType(v1::DType wire, absl::string_view field) {
  switch (wire) {
    case v1::DTYPE_F32:
      return kernels::DType::kF32;
    case v1::DTYPE_F16:
      return kernels::DType::kF16;
    case v1::DTYPE_BF16:
      return kernels::DType::kBF16;
    default:
      return absl::InvalidArgumentError(absl::StrCat(field, "=", static_cast<int>(wire),
                                                     ", want DTYPE_F32, DTYPE_F16 or DTYPE_BF16"));
  }
}

absl::StatusOr<RowsSource> DecodeRows(const v1::RowsTensor& wire, const RowsShape& shape,
                                      absl::string_view where, RegionSource& regions) {
  RowsSource rows;
  KEEPSET_ASSIGN_OR_RETURN(rows.dtype, DecodeDType(wire.dtype(), absl::StrCat(where, ": dtype")));
  const int64_t element_bytes = kernels::DTypeBytes(rows.dtype);
  if (shape.rows < 1) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": num_rows=0, want at least 1"));
  }
  KEEPSET_ASSIGN_OR_RETURN(rows.bytes, FindBytes(wire.data(), element_bytes, where, regions));
  KEEPSET_ASSIGN_OR_RETURN(rows.head_stride, Stride(where, "head_stride", wire.head_stride()));
  KEEPSET_ASSIGN_OR_RETURN(rows.row_stride, Stride(where, "row_stride", wire.row_stride()));
  if (rows.head_stride == 0 && rows.row_stride == 0) {
    KEEPSET_RETURN_IF_ERROR(
        CheckContiguousInline(wire.data(), rows.bytes.size,
                              shape.heads * shape.rows * shape.last_dim * element_bytes, where));
  }
  if (rows.row_stride == 0) rows.row_stride = shape.last_dim;
  if (rows.head_stride == 0) rows.head_stride = shape.rows * rows.row_stride;
  return rows;
}

absl::StatusOr<kernels::LseView> DecodeLse(const v1::RowsTensor& wire, v1::LseBase base,
                                           int64_t heads, int64_t rows, absl::string_view where,
                                           RegionSource& regions) {
  if (base != v1::LSE_BASE_E && base != v1::LSE_BASE_2) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": lse_base=", static_cast<int>(base),
                                                   ", want LSE_BASE_E or LSE_BASE_2"));
  }
  KEEPSET_ASSIGN_OR_RETURN(const RowsSource source,
                           DecodeRows(wire, {heads, rows, 1}, where, regions));
  if (source.row_stride != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": row_stride=", source.row_stride, ", want 1"));
  }
  kernels::LseView view = {source.bytes.data, source.bytes.size, source.dtype, heads, rows,
                           source.head_stride};
  view.base = base == v1::LSE_BASE_2 ? kernels::LogBase::kTwo : kernels::LogBase::kE;
  KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(view, where));
  return view;
}

absl::StatusOr<kernels::KvView> DecodeKv(const v1::KvTensor& wire, const KvShape& shape,
                                         absl::Span<const int32_t> block_table,
                                         absl::string_view where, RegionSource& regions) {
  kernels::KvView view;
  KEEPSET_ASSIGN_OR_RETURN(view.dtype, DecodeDType(wire.dtype(), absl::StrCat(where, ": dtype")));
  KEEPSET_ASSIGN_OR_RETURN(const ByteSource bytes,
                           FindBytes(wire.data(), kernels::DTypeBytes(view.dtype), where, regions));
  view.data = bytes.data;
  view.size_bytes = bytes.size;
  const absl::Span<const int32_t> own_table = wire.block_table();
  KEEPSET_RETURN_IF_ERROR(
      DecodeLayout(wire, shape, own_table.empty() ? block_table : own_table, where, view));
  KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(view, where));
  return view;
}

absl::StatusOr<kernels::MutableKvView> DecodeDestination(const v1::KvTensor& wire,
                                                         const KvShape& shape,
                                                         kernels::DType source_dtype,
                                                         absl::string_view where,
                                                         RegionSource& regions) {
  kernels::MutableKvView view;
  KEEPSET_ASSIGN_OR_RETURN(view.dtype, DecodeDType(wire.dtype(), absl::StrCat(where, ": dtype")));
  if (view.dtype != source_dtype) {
    return absl::InvalidArgumentError(absl::StrCat(where,
                                                   ": dtype=", kernels::DTypeName(view.dtype),
                                                   ", want ", kernels::DTypeName(source_dtype)));
  }
  KEEPSET_RETURN_IF_ERROR(FindWritable(wire.data(), where, regions, view));
  KEEPSET_RETURN_IF_ERROR(DecodeLayout(wire, shape, wire.block_table(), where, view));
  KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(view, where));
  return view;
}

absl::StatusOr<kernels::MutableKvView> DecodeInPlace(const v1::KvTensor& wire, const KvShape& shape,
                                                     absl::Span<const int32_t> block_table,
                                                     absl::string_view where,
                                                     RegionSource& regions) {
  kernels::MutableKvView view;
  KEEPSET_ASSIGN_OR_RETURN(view.dtype, DecodeDType(wire.dtype(), absl::StrCat(where, ": dtype")));
  KEEPSET_RETURN_IF_ERROR(FindWritable(wire.data(), where, regions, view));
  const absl::Span<const int32_t> own_table = wire.block_table();
  KEEPSET_RETURN_IF_ERROR(
      DecodeLayout(wire, shape, own_table.empty() ? block_table : own_table, where, view));
  KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(view, where));
  return view;
}

}  // namespace keepset::service
