// Views of a worker's tensors: plain data, no ownership. A view is valid as long as the memory it
// points at; the caller keeps that memory mapped and unchanged for the duration of a call.
//
// Strides are in elements; the innermost dimension (head_dim, or T of a tile) has stride 1.
#ifndef KEEPSET_KERNELS_VIEWS_H_
#define KEEPSET_KERNELS_VIEWS_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace keepset::kernels {

enum class DType : uint8_t { kF32 = 1, kF16 = 2, kBF16 = 3 };

// Bytes of one element.
constexpr int64_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// "f32", "f16", "bf16".
absl::string_view DTypeName(DType dtype);

// K or V of one layer: logical shape [num_kv_heads, seq_len, head_dim].
//
// Contiguous (block_size == 0): element (g, t, c) is data[g*head_stride + t*token_stride + c]; NHD
// and HND differ in the strides only. Paged (block_size > 0): data[block_table[t /
// block_size]*block_stride + (t % block_size)*token_stride
// + g*head_stride + c]. Rows of the last block at or after seq_len may hold anything and are not
// read.
struct KvView {
  const std::byte* data = nullptr;
  int64_t size_bytes = 0;  // Readable bytes from `data`; every address is checked against it.
  DType dtype = DType::kF32;
  int64_t num_kv_heads = 0;
  int64_t seq_len = 0;
  int64_t head_dim = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int64_t block_size = 0;
  int64_t block_stride = 0;
  absl::Span<const int32_t> block_table;  // [ceil(seq_len / block_size)], empty when contiguous

  bool present() const { return data != nullptr; }
};

// A writable K or V: destination of a gather, same addressing as KvView with `seq_len` as capacity.
struct MutableKvView {
  std::byte* data = nullptr;
  int64_t size_bytes = 0;
  DType dtype = DType::kF32;
  int64_t num_kv_heads = 0;
  int64_t seq_len = 0;
  int64_t head_dim = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int64_t block_size = 0;
  int64_t block_stride = 0;
  absl::Span<const int32_t> block_table;

  bool present() const { return data != nullptr; }
};

// The same rows, for reading.
KvView Readable(const MutableKvView& view);

// Queries of the observed rows: [num_qo_heads, num_rows, head_dim], post-RoPE.
struct QueryView {
  const std::byte* data = nullptr;
  int64_t size_bytes = 0;
  DType dtype = DType::kF32;
  int64_t num_qo_heads = 0;
  int64_t num_rows = 0;
  int64_t head_dim = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;

  bool present() const { return data != nullptr; }
};

// Attention tile of the observed rows: [num_qo_heads, num_rows, seq_len], each row a softmax.
struct TileView {
  const std::byte* data = nullptr;
  int64_t size_bytes = 0;
  DType dtype = DType::kF32;
  int64_t num_qo_heads = 0;
  int64_t num_rows = 0;
  int64_t seq_len = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;

  bool present() const { return data != nullptr; }
};

// Attention of the observed rows already added up per column: [num_qo_heads, seq_len].
struct ColumnsView {
  const std::byte* data = nullptr;
  int64_t size_bytes = 0;
  DType dtype = DType::kF32;
  int64_t num_qo_heads = 0;
  int64_t seq_len = 0;
  int64_t head_stride = 0;

  bool present() const { return data != nullptr; }
};

// Of the logarithm in a log-sum-exp.
enum class LogBase { kE, kTwo };

// Log-sum-exp of each observed row over its visible positions: [num_qo_heads, num_rows].
struct LseView {
  const std::byte* data = nullptr;
  int64_t size_bytes = 0;
  DType dtype = DType::kF32;
  int64_t num_qo_heads = 0;
  int64_t num_rows = 0;
  int64_t head_stride = 0;
  LogBase base = LogBase::kE;

  bool present() const { return data != nullptr; }
};

// Overflow-safe checks: positive dimensions, strides and block ids inside size_bytes, natural
// alignment of `data`. InvalidArgument names `what` ("layer 3: k"), the value and the limit.
absl::Status ValidateView(const KvView& view, absl::string_view what);
absl::Status ValidateView(const MutableKvView& view, absl::string_view what);
absl::Status ValidateView(const QueryView& view, absl::string_view what);
absl::Status ValidateView(const TileView& view, absl::string_view what);
absl::Status ValidateView(const ColumnsView& view, absl::string_view what);
absl::Status ValidateView(const LseView& view, absl::string_view what);

}  // namespace keepset::kernels

#endif  // KEEPSET_KERNELS_VIEWS_H_
