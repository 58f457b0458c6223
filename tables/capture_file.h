// Reading capture files (formats.md "Capture"): what one prompt's prefill looked like.
//
// A CaptureFile maps the file and checks everything but the values of Q, K, V and tiles, which the
// engine checks while it reads them. Tensor spans point into the mapping, or into a private copy
// where the file's data is not aligned to its element size; they live as long as the object. A
// capture must not be written while it is open. Immutable and thread-safe.
#ifndef KEEPSET_TABLES_CAPTURE_FILE_H_
#define KEEPSET_TABLES_CAPTURE_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "tables/model_fingerprint.h"
#include "tables/safetensors.h"

namespace keepset::tables {

// A labelled range of positions; it protects only when a request says so.
struct CaptureSpan {
  std::string name;
  int64_t begin = 0;
  int64_t end = 0;  // exclusive, <= seq_len

  bool operator==(const CaptureSpan&) const = default;
};

// One contiguous row-major tensor, aligned to its element size. Empty bytes: absent.
struct CaptureTensor {
  TensorDType dtype = TensorDType::kF32;  // F32, F16 or BF16
  std::vector<int64_t> shape;
  absl::Span<const std::byte> bytes;

  bool present() const { return !bytes.empty(); }
};

struct CaptureLayer {
  CaptureTensor q_window;    // [num_qo_heads, window, head_dim], post-RoPE
  CaptureTensor window_lse;  // [num_qo_heads, window], natural log
  CaptureTensor attn_tile;   // [num_qo_heads, window, seq_len]; wins over q_window
  CaptureTensor k;           // [num_kv_heads, seq_len, head_dim], post-RoPE
  CaptureTensor v;           // [num_kv_heads, seq_len, head_dim]
};

// The capture without its layers.
struct CaptureInfo {
  ModelFingerprint model;  // counts equal to the capture's own
  int64_t seq_len = 0;     // T
  int64_t window = 0;      // W, 1..T
  double softmax_scale = 0.0;
  // Dtype of K and V in all layers; nullopt when the capture has neither.
  std::optional<TensorDType> kv_dtype;
  std::optional<double> ppl;  // wins over window_logprobs
  std::vector<CaptureSpan> spans;
  std::vector<int64_t> row_positions;  // [W] strictly ascending, < T; empty: the last W
  std::vector<float> window_logprobs;  // [W], natural log, or empty
  std::vector<int64_t> input_ids;      // [T] or empty
  std::string metadata_json;           // the file's whole JSON document
  std::vector<std::string> ignored;    // JSON keys and tensors this version does not know
};

class CaptureFile {
 public:
  // NotFound: no such file. InvalidArgument: damaged or inconsistent, naming file, field, value and
  // what would be right. FailedPrecondition: written by a newer version.
  static absl::StatusOr<std::unique_ptr<CaptureFile>> Open(const std::string& path);
  // `bytes` are copied; `label` stands for the path in messages.
  static absl::StatusOr<std::unique_ptr<CaptureFile>> Parse(absl::Span<const std::byte> bytes,
                                                            absl::string_view label);

  virtual ~CaptureFile() = default;

  virtual const CaptureInfo& info() const = 0;
  virtual const std::vector<CaptureLayer>& layers() const = 0;  // [num_layers]

  // NotFound lists the names there are; InvalidArgument when several spans bear the name.
  virtual absl::StatusOr<CaptureSpan> FindSpan(absl::string_view name) const = 0;
};

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_CAPTURE_FILE_H_
