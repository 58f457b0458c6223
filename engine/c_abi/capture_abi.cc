// keepset.h: captures and result files.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/status_macros.h"
#include "engine/c_abi/handles.h"
#include "tables/capture_file.h"
#include "tables/model_fingerprint.h"
#include "tables/result_file.h"

namespace keepset::engine {
namespace {

keepset_dtype ToC(tables::TensorDType dtype) {
  if (dtype == tables::TensorDType::kF16) return KEEPSET_F16;
  return dtype == tables::TensorDType::kBF16 ? KEEPSET_BF16 : KEEPSET_F32;
}

absl::StatusOr<tables::TensorDType> ToTensorDType(int32_t dtype, absl::string_view what) {
  KEEPSET_ASSIGN_OR_RETURN(const kernels::DType known, ToDType(dtype, what));
  if (known == kernels::DType::kF16) return tables::TensorDType::kF16;
  return known == kernels::DType::kBF16 ? tables::TensorDType::kBF16 : tables::TensorDType::kF32;
}

// [heads, rows, last_dim], or [heads, rows] as last_dim 1.
keepset_rows_view RowsView(const tables::CaptureTensor& tensor) {
  keepset_rows_view view = {};
  if (!tensor.present()) return view;
  view.data = tensor.bytes.data();
  view.size_bytes = static_cast<int64_t>(tensor.bytes.size());
  view.dtype = ToC(tensor.dtype);
  view.num_qo_heads = tensor.shape[0];
  view.num_rows = tensor.shape[1];
  view.last_dim = tensor.shape.size() > 2 ? tensor.shape[2] : 1;
  view.head_stride = view.num_rows * view.last_dim;
  view.row_stride = view.last_dim;
  return view;
}

// [Hkv, T, d]
keepset_kv_view KvOf(const tables::CaptureTensor& tensor) {
  keepset_kv_view view = {};
  if (!tensor.present()) return view;
  // Sources are only read; the field is writable for destinations.
  view.data = const_cast<std::byte*>(tensor.bytes.data());
  view.size_bytes = static_cast<int64_t>(tensor.bytes.size());
  view.dtype = ToC(tensor.dtype);
  view.num_kv_heads = tensor.shape[0];
  view.seq_len = tensor.shape[1];
  view.head_dim = tensor.shape[2];
  view.head_stride = view.seq_len * view.head_dim;
  view.token_stride = view.head_dim;
  return view;
}

absl::StatusOr<int64_t> GatheredBytes(int64_t heads, int64_t tokens, int64_t head_dim,
                                      tables::TensorDType dtype) {
  int64_t bytes = 0;
  if (heads < 1 || tokens < 0 || head_dim < 1 || __builtin_mul_overflow(heads, tokens, &bytes) ||
      __builtin_mul_overflow(bytes, head_dim, &bytes) ||
      __builtin_mul_overflow(bytes, tables::TensorDTypeBytes(dtype), &bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("gathered rows [", heads, ", ", tokens, ", ",
                                                   head_dim, "], want positive dimensions"));
  }
  return bytes;
}

}  // namespace
}  // namespace keepset::engine

using ::keepset::engine::Guard;
using ::keepset::engine::kLeastSpecBytes;
using ::keepset::engine::RequirePointer;
using ::keepset::engine::RequireStruct;

extern "C" {

keepset_status keepset_capture_open(const char* path, keepset_capture** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(path, "path"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    auto capture = std::make_unique<keepset_capture>();
    KEEPSET_ASSIGN_OR_RETURN(capture->file, keepset::tables::CaptureFile::Open(path));
    capture->model_json = keepset::tables::ModelFingerprintJson(capture->file->info().model);
    *out = capture.release();
    return absl::OkStatus();
  });
}

void keepset_capture_close(keepset_capture* capture) { delete capture; }

const char* keepset_capture_json(const keepset_capture* capture) {
  return capture->file->info().metadata_json.c_str();
}

keepset_status keepset_capture_fill_spec(const keepset_capture* capture,
                                         keepset_operation_spec* spec) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(capture, "capture"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(spec, "spec"));
    KEEPSET_RETURN_IF_ERROR(
        RequireStruct(spec->struct_size, kLeastSpecBytes, "keepset_operation_spec"));
    const keepset::tables::CaptureInfo& info = capture->file->info();
    spec->model_json = capture->model_json.c_str();
    spec->seq_len = info.seq_len;
    spec->num_rows = info.window;
    spec->row_positions = info.row_positions.empty() ? nullptr : info.row_positions.data();
    spec->softmax_scale = static_cast<float>(info.softmax_scale);
    spec->kv_dtype =
        keepset::engine::ToC(info.kv_dtype.value_or(keepset::tables::TensorDType::kF32));
    const auto& layers = capture->file->layers();
    spec->value_head_dim =
        layers.empty() || !layers.front().v.present() ? 0 : layers.front().v.shape[2];
    spec->ppl = info.ppl.value_or(std::numeric_limits<double>::quiet_NaN());
    spec->window_logprobs = info.window_logprobs.empty() ? nullptr : info.window_logprobs.data();
    spec->num_window_logprobs = info.window_logprobs.size();
    return absl::OkStatus();
  });
}

keepset_status keepset_capture_span(const keepset_capture* capture, const char* name,
                                    keepset_span* out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(capture, "capture"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(name, "name"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::tables::CaptureSpan found,
                             capture->file->FindSpan(name));
    // The name is handed out from the capture, which lives longer than the copy found.
    for (const keepset::tables::CaptureSpan& span : capture->file->info().spans) {
      if (span == found) *out = {span.name.c_str(), span.begin, span.end};
    }
    return absl::OkStatus();
  });
}

keepset_status keepset_capture_layer(const keepset_capture* capture, int64_t layer,
                                     keepset_layer_observation* out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(capture, "capture"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    KEEPSET_RETURN_IF_ERROR(RequireStruct(out->struct_size,
                                          offsetof(keepset_layer_observation, column_stats),
                                          "keepset_layer_observation"));
    const auto& layers = capture->file->layers();
    if (layer < 0 || layer >= static_cast<int64_t>(layers.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", layer, ", want 0..", layers.size() - 1));
    }
    const keepset::tables::CaptureLayer& from = layers[layer];
    keepset_layer_observation cleared = {};
    cleared.struct_size = out->struct_size;
    std::memcpy(out, &cleared, std::min(out->struct_size, sizeof(cleared)));
    out->q_window = keepset::engine::RowsView(from.q_window);
    out->window_lse = keepset::engine::RowsView(from.window_lse);
    out->attn_tile = keepset::engine::RowsView(from.attn_tile);
    out->k = keepset::engine::KvOf(from.k);
    out->v = keepset::engine::KvOf(from.v);
    return absl::OkStatus();
  });
}

keepset_status keepset_result_write(const char* path, const char* result_json,
                                    const keepset_index_set* sets, size_t num_sets,
                                    const keepset_gathered_layer* gathered, size_t num_gathered) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(path, "path"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(result_json, "result_json"));
    if (num_sets > 0) KEEPSET_RETURN_IF_ERROR(RequirePointer(sets, "sets"));
    if (num_gathered > 0) KEEPSET_RETURN_IF_ERROR(RequirePointer(gathered, "gathered"));
    std::vector<keepset::tables::ResultIndexSet> index_sets;
    for (size_t i = 0; i < num_sets; ++i) {
      if (sets[i].count < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("sets[", i, "].count=", sets[i].count, ", want 0 or more"));
      }
      if (sets[i].count > 0) KEEPSET_RETURN_IF_ERROR(RequirePointer(sets[i].indices, "indices"));
      index_sets.push_back(
          {sets[i].layer, sets[i].set,
           absl::MakeConstSpan(sets[i].indices, static_cast<size_t>(sets[i].count))});
    }
    std::vector<keepset::tables::ResultGathered> rows;
    for (size_t i = 0; i < num_gathered; ++i) {
      const keepset_gathered_layer& from = gathered[i];
      keepset::tables::ResultGathered to;
      to.layer = from.layer;
      to.set = from.set;
      KEEPSET_ASSIGN_OR_RETURN(
          to.dtype, keepset::engine::ToTensorDType(from.dtype, absl::StrCat("gathered[", i, "]")));
      to.num_kv_heads = from.num_kv_heads;
      to.num_tokens = from.num_tokens;
      to.k_head_dim = from.k_head_dim;
      to.v_head_dim = from.v_head_dim;
      KEEPSET_ASSIGN_OR_RETURN(
          const int64_t k_bytes,
          keepset::engine::GatheredBytes(to.num_kv_heads, to.num_tokens, to.k_head_dim, to.dtype));
      KEEPSET_ASSIGN_OR_RETURN(
          const int64_t v_bytes,
          keepset::engine::GatheredBytes(to.num_kv_heads, to.num_tokens, to.v_head_dim, to.dtype));
      to.k =
          absl::MakeConstSpan(static_cast<const std::byte*>(from.k), static_cast<size_t>(k_bytes));
      to.v =
          absl::MakeConstSpan(static_cast<const std::byte*>(from.v), static_cast<size_t>(v_bytes));
      if (k_bytes > 0) KEEPSET_RETURN_IF_ERROR(RequirePointer(from.k, "gathered k"));
      if (v_bytes > 0) KEEPSET_RETURN_IF_ERROR(RequirePointer(from.v, "gathered v"));
      rows.push_back(to);
    }
    return keepset::tables::WriteResultFile(path, result_json, index_sets, rows);
  });
}

}  // extern "C"
