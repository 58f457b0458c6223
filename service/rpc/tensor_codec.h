// One tensor of a request: bytes found, shape and strides checked, a view made.
// Used by request_codec; errors are prefixed with `where`, for example "layer 3: k".
#ifndef KEEPSET_SERVICE_RPC_TENSOR_CODEC_H_
#define KEEPSET_SERVICE_RPC_TENSOR_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "keepset/v1/common.pb.h"
#include "keepset/v1/compression.pb.h"
#include "kernels/views.h"
#include "service/rpc/request_codec.h"

namespace keepset::service {

struct ByteSource {
  const std::byte* data = nullptr;
  int64_t size = 0;
};

// A decoded RowsTensor; strides in elements.
struct RowsSource {
  ByteSource bytes;
  kernels::DType dtype = kernels::DType::kF32;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

struct RowsShape {
  int64_t heads = 0;
  int64_t rows = 0;
  int64_t last_dim = 0;
};

struct KvShape {
  int64_t num_kv_heads = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
};

absl::StatusOr<kernels::DType> DecodeDType(v1::DType wire, absl::string_view field);

inline bool HasData(const v1::RowsTensor& tensor) {
  return tensor.data().source_case() != v1::TensorData::SOURCE_NOT_SET;
}
inline bool HasData(const v1::KvTensor& tensor) {
  return tensor.data().source_case() != v1::TensorData::SOURCE_NOT_SET;
}

absl::StatusOr<RowsSource> DecodeRows(const v1::RowsTensor& wire, const RowsShape& shape,
                                      absl::string_view where, RegionSource& regions);

// [heads, rows].
absl::StatusOr<kernels::LseView> DecodeLse(const v1::RowsTensor& wire, v1::LseBase base,
                                           int64_t heads, int64_t rows, absl::string_view where,
                                           RegionSource& regions);

absl::StatusOr<kernels::KvView> DecodeKv(const v1::KvTensor& wire, const KvShape& shape,
                                         absl::Span<const int32_t> block_table,
                                         absl::string_view where, RegionSource& regions);

// `shape.tokens` is the capacity. FailedPrecondition: the region is read-only. InvalidArgument: not
// a region, or another dtype than `source_dtype`.
absl::StatusOr<kernels::MutableKvView> DecodeDestination(const v1::KvTensor& wire,
                                                         const KvShape& shape,
                                                         kernels::DType source_dtype,
                                                         absl::string_view where,
                                                         RegionSource& regions);

// A source whose rows move within itself. Errors are those of DecodeKv and of DecodeDestination.
absl::StatusOr<kernels::MutableKvView> DecodeInPlace(const v1::KvTensor& wire, const KvShape& shape,
                                                     absl::Span<const int32_t> block_table,
                                                     absl::string_view where,
                                                     RegionSource& regions);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_TENSOR_CODEC_H_
