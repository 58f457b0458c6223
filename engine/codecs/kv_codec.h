// How compacted K or V is written down for transfer or storage. Composes with any policy.
//
// A codec holds no state between calls and is thread-safe; backend and context are the caller's.
// Encoded bytes describe themselves and are never trusted: dimensions, lengths and checksums are
// verified before anything is written.
#ifndef KEEPSET_ENGINE_CODECS_KV_CODEC_H_
#define KEEPSET_ENGINE_CODECS_KV_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/compute_backend.h"
#include "kernels/views.h"

namespace keepset::engine {

class KvCodec {
 public:
  virtual ~KvCodec() = default;

  virtual absl::string_view name() const = 0;

  // Encode never returns more bytes than this for [num_kv_heads, num_tokens, head_dim].
  // InvalidArgument when the size overflows or a dimension is not positive.
  virtual absl::StatusOr<int64_t> MaxEncodedBytes(int64_t num_kv_heads, int64_t num_tokens,
                                                  int64_t head_dim, kernels::DType dtype) const = 0;

  // Largest |decoded - original| of an element, as a fraction of the largest magnitude of its row;
  // 0: bit for bit.
  virtual double max_relative_error() const = 0;

  // `in`: [num_kv_heads, n, head_dim], any layout.
  virtual absl::StatusOr<std::vector<std::byte>> Encode(kernels::ComputeBackend& backend,
                                                        kernels::OpContext& context,
                                                        const kernels::KvView& in) const = 0;

  // Writes the rows to `out`, whose heads, head_dim and dtype must be those encoded and whose
  // seq_len is the capacity. Returns n. InvalidArgument: torn or damaged bytes, or another shape;
  // `out` is then as it was.
  virtual absl::StatusOr<int64_t> Decode(kernels::ComputeBackend& backend,
                                         kernels::OpContext& context,
                                         absl::Span<const std::byte> encoded,
                                         const kernels::MutableKvView& out) const = 0;
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_CODECS_KV_CODEC_H_
