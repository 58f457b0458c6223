#include "tables/capture_file.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

constexpr int64_t kNewestVersion = 1;
constexpr int64_t kMaxSeqLen = INT32_MAX;  // positions are 32-bit on the way back
constexpr absl::string_view kMetadataKey = "keepset";
constexpr absl::string_view kKnownKeys[] = {
    "format",       "format_version", "model",    "seq_len",       "window", "num_layers",
    "num_qo_heads", "num_kv_heads",   "head_dim", "softmax_scale", "ppl",    "spans"};

class ParsedCapture final : public CaptureFile {
 public:
  explicit ParsedCapture(std::unique_ptr<SafetensorsFile> file) : file_(std::move(file)) {}

  // Checks everything; the object is of no use unless this returned OK.
  absl::Status Check();

  const CaptureInfo& info() const override { return info_; }
  const std::vector<CaptureLayer>& layers() const override { return layers_; }
  absl::StatusOr<CaptureSpan> FindSpan(absl::string_view name) const override;

 private:
  absl::Status ReadModel(const Json& document);
  absl::Status ReadSpans(const Json& document);
  absl::Status ReadVectors();
  absl::Status ReadLayer(int64_t layer);
  // The tensor with the given shape, or an absent one.
  absl::StatusOr<CaptureTensor> ReadTensor(const std::string& name,
                                           const std::vector<int64_t>& shape);
  absl::Status CheckLayerDTypes(int64_t layer, const CaptureLayer& tensors);
  void ListIgnored(const Json& document);

  const std::unique_ptr<SafetensorsFile> file_;
  CaptureInfo info_;
  std::vector<CaptureLayer> layers_;
  std::set<std::string> used_tensors_;
  // Copies of tensors whose data is not aligned to its element size.
  std::vector<std::vector<uint64_t>> aligned_copies_;
};

absl::Status ParsedCapture::ReadModel(const Json& document) {
  const std::string& where = file_->label();
  KEEPSET_ASSIGN_OR_RETURN(Json model, ObjectField(document, "model", where));
  for (const char* key : {"num_layers", "num_qo_heads", "num_kv_heads", "head_dim"}) {
    KEEPSET_ASSIGN_OR_RETURN(const int64_t count, IntField(document, key, 1, kMaxHeadDim, where));
    if (!model.contains(key)) model[key] = count;
    if (model[key] != count) {
      return FieldError(where, absl::StrCat("model.", key), PreviewJson(model[key]),
                        absl::StrCat(count, " as the capture's own ", key));
    }
  }
  KEEPSET_ASSIGN_OR_RETURN(info_.model,
                           ParseModelFingerprint(model.dump(), absl::StrCat(where, ": model")));
  return absl::OkStatus();
}

absl::Status ParsedCapture::ReadSpans(const Json& document) {
  const std::string& where = file_->label();
  const auto spans = document.find("spans");
  if (spans == document.end() || spans->is_null()) return absl::OkStatus();
  if (!spans->is_array()) return FieldError(where, "spans", PreviewJson(*spans), "a list");
  for (std::size_t i = 0; i < spans->size(); ++i) {
    const std::string span_where = absl::StrCat(where, ": spans[", i, "]");
    const Json& entry = (*spans)[i];
    if (!entry.is_object()) {
      return absl::InvalidArgumentError(
          absl::StrCat(span_where, ": ", PreviewJson(entry), ", want an object"));
    }
    CaptureSpan span;
    KEEPSET_ASSIGN_OR_RETURN(span.name, StringField(entry, "name", span_where));
    KEEPSET_ASSIGN_OR_RETURN(span.begin, IntField(entry, "begin", 0, info_.seq_len, span_where));
    KEEPSET_ASSIGN_OR_RETURN(span.end,
                             IntField(entry, "end", span.begin, info_.seq_len, span_where));
    info_.spans.push_back(std::move(span));
  }
  return absl::OkStatus();
}

absl::Status ParsedCapture::Check() {
  const std::string& where = file_->label();
  const std::string* metadata = file_->metadata(kMetadataKey);
  if (metadata == nullptr) {
    return FieldError(where, "__metadata__.keepset", "(missing)", "the capture's JSON document");
  }
  info_.metadata_json = *metadata;
  KEEPSET_ASSIGN_OR_RETURN(const Json document,
                           ParseStrictJsonObject(*metadata, absl::StrCat(where, ": keepset")));
  KEEPSET_ASSIGN_OR_RETURN(const std::string format, StringField(document, "format", where));
  if (format != "keepset.capture") {
    return FieldError(where, "format", PreviewJson(format), "keepset.capture");
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<int64_t> version,
                           OptionalIntField(document, "format_version", 1, INT64_MAX, where));
  if (version.value_or(1) > kNewestVersion) {
    return absl::FailedPreconditionError(absl::StrCat(where, ": format_version=", *version,
                                                      ", want at most ", kNewestVersion,
                                                      "; written by a newer version"));
  }
  KEEPSET_RETURN_IF_ERROR(ReadModel(document));
  KEEPSET_ASSIGN_OR_RETURN(info_.seq_len, IntField(document, "seq_len", 1, kMaxSeqLen, where));
  KEEPSET_ASSIGN_OR_RETURN(info_.window, IntField(document, "window", 1, info_.seq_len, where));
  KEEPSET_ASSIGN_OR_RETURN(info_.softmax_scale, FiniteField(document, "softmax_scale", where));
  if (!(info_.softmax_scale > 0)) {
    return FieldError(where, "softmax_scale", absl::StrCat(info_.softmax_scale),
                      "a positive number");
  }
  KEEPSET_ASSIGN_OR_RETURN(info_.ppl, OptionalFiniteField(document, "ppl", where));
  if (info_.ppl.has_value() && !(*info_.ppl > 0)) {
    return FieldError(where, "ppl", absl::StrCat(*info_.ppl), "a positive number");
  }
  KEEPSET_RETURN_IF_ERROR(ReadSpans(document));
  KEEPSET_RETURN_IF_ERROR(ReadVectors());
  for (int64_t layer = 0; layer < info_.model.num_layers; ++layer) {
    KEEPSET_RETURN_IF_ERROR(ReadLayer(layer));
  }
  ListIgnored(document);
  return absl::OkStatus();
}

// The one-dimensional tensors beside the layers.
absl::Status ParsedCapture::ReadVectors() {
  const std::pair<absl::string_view, int64_t> vectors[] = {{"window_logprobs", info_.window},
                                                           {"input_ids", info_.seq_len},
                                                           {"row_positions", info_.window}};
  for (const auto& [name, size] : vectors) {
    const TensorInfo* tensor = file_->Find(name);
    if (tensor == nullptr) continue;
    used_tensors_.insert(std::string(name));
    const std::string where = absl::StrCat(file_->label(), ": tensor ", name);
    if (tensor->shape != std::vector<int64_t>{size}) {
      return FieldError(where, "shape", absl::StrCat("[", absl::StrJoin(tensor->shape, ", "), "]"),
                        absl::StrCat("[", size, "]"));
    }
    if (name == "window_logprobs") {
      if (tensor->dtype != TensorDType::kF32) {
        return FieldError(where, "dtype", TensorDTypeName(tensor->dtype), "F32");
      }
      KEEPSET_ASSIGN_OR_RETURN(info_.window_logprobs, ReadFloats(*file_, *tensor));
    } else if (name == "input_ids") {
      KEEPSET_ASSIGN_OR_RETURN(info_.input_ids, ReadInts(*file_, *tensor));
    } else {
      KEEPSET_ASSIGN_OR_RETURN(info_.row_positions, ReadInts(*file_, *tensor));
    }
  }
  int64_t lowest = 0;
  for (std::size_t i = 0; i < info_.row_positions.size(); ++i) {
    const int64_t position = info_.row_positions[i];
    if (position < lowest || position >= info_.seq_len) {
      return FieldError(absl::StrCat(file_->label(), ": tensor row_positions"),
                        absl::StrCat("element[", i, "]"), absl::StrCat(position),
                        absl::StrCat(lowest, "..", info_.seq_len - 1, " (strictly ascending)"));
    }
    lowest = position + 1;
  }
  return absl::OkStatus();
}

absl::StatusOr<CaptureTensor> ParsedCapture::ReadTensor(const std::string& name,
                                                        const std::vector<int64_t>& shape) {
  CaptureTensor tensor;
  const TensorInfo* info = file_->Find(name);
  if (info == nullptr) return tensor;
  used_tensors_.insert(name);
  const std::string where = absl::StrCat(file_->label(), ": tensor ", name);
  if (info->dtype != TensorDType::kF32 && info->dtype != TensorDType::kF16 &&
      info->dtype != TensorDType::kBF16) {
    return FieldError(where, "dtype", TensorDTypeName(info->dtype), "F32, F16 or BF16");
  }
  if (info->shape != shape) {
    return FieldError(where, "shape", absl::StrCat("[", absl::StrJoin(info->shape, ", "), "]"),
                      absl::StrCat("[", absl::StrJoin(shape, ", "), "]"));
  }
  tensor.dtype = info->dtype;
  tensor.shape = info->shape;
  tensor.bytes = info->bytes;
  const auto address = reinterpret_cast<uintptr_t>(info->bytes.data());
  if (address % static_cast<uintptr_t>(TensorDTypeBytes(info->dtype)) != 0) {
    std::vector<uint64_t>& copy =
        aligned_copies_.emplace_back((info->bytes.size() + sizeof(uint64_t) - 1) / 8);
    std::memcpy(copy.data(), info->bytes.data(), info->bytes.size());
    tensor.bytes = {reinterpret_cast<const std::byte*>(copy.data()), info->bytes.size()};
  }
  return tensor;
}

absl::Status ParsedCapture::CheckLayerDTypes(int64_t layer, const CaptureLayer& tensors) {
  const std::string where = absl::StrCat(file_->label(), ": layer ", layer);
  for (const auto& [name, tensor] : {std::pair("k", &tensors.k), std::pair("v", &tensors.v)}) {
    if (!tensor->present()) continue;
    if (!info_.kv_dtype.has_value()) info_.kv_dtype = tensor->dtype;
    if (*info_.kv_dtype != tensor->dtype) {
      return FieldError(
          where, absl::StrCat(name, ".dtype"), TensorDTypeName(tensor->dtype),
          absl::StrCat(TensorDTypeName(*info_.kv_dtype), " as the other K and V of the capture"));
    }
  }
  const CaptureTensor& lse = tensors.window_lse;
  if (lse.present() && tensors.k.present() && lse.dtype != TensorDType::kF32 &&
      lse.dtype != tensors.k.dtype) {
    return FieldError(where, "window_lse.dtype", TensorDTypeName(lse.dtype),
                      "F32 or the dtype of K");
  }
  return absl::OkStatus();
}

absl::Status ParsedCapture::ReadLayer(int64_t layer) {
  const int64_t heads = info_.model.num_qo_heads;
  const int64_t kv_heads = info_.model.num_kv_heads;
  const int64_t dim = info_.model.head_dim;
  const std::string prefix = absl::StrCat("layers.", layer, ".");
  CaptureLayer tensors;
  KEEPSET_ASSIGN_OR_RETURN(
      tensors.q_window, ReadTensor(absl::StrCat(prefix, "q_window"), {heads, info_.window, dim}));
  KEEPSET_ASSIGN_OR_RETURN(tensors.window_lse,
                           ReadTensor(absl::StrCat(prefix, "window_lse"), {heads, info_.window}));
  KEEPSET_ASSIGN_OR_RETURN(tensors.attn_tile, ReadTensor(absl::StrCat(prefix, "attn_tile"),
                                                         {heads, info_.window, info_.seq_len}));
  KEEPSET_ASSIGN_OR_RETURN(tensors.k,
                           ReadTensor(absl::StrCat(prefix, "k"), {kv_heads, info_.seq_len, dim}));
  KEEPSET_ASSIGN_OR_RETURN(tensors.v,
                           ReadTensor(absl::StrCat(prefix, "v"), {kv_heads, info_.seq_len, dim}));
  KEEPSET_RETURN_IF_ERROR(CheckLayerDTypes(layer, tensors));
  if (!tensors.attn_tile.present() && !(tensors.q_window.present() && tensors.k.present())) {
    return absl::InvalidArgumentError(
        absl::StrCat(file_->label(), ": layer ", layer, " has neither ", prefix, "q_window and ",
                     prefix, "k nor ", prefix, "attn_tile, want one of the two"));
  }
  layers_.push_back(std::move(tensors));
  return absl::OkStatus();
}

void ParsedCapture::ListIgnored(const Json& document) {
  for (const auto& [key, value] : document.items()) {
    if (std::find(std::begin(kKnownKeys), std::end(kKnownKeys), key) == std::end(kKnownKeys)) {
      info_.ignored.push_back(absl::StrCat("key ", absl::CHexEscape(key)));
    }
  }
  for (const auto& [key, value] : file_->all_metadata()) {
    if (key != kMetadataKey) {
      info_.ignored.push_back(absl::StrCat("metadata ", absl::CHexEscape(key)));
    }
  }
  for (const TensorInfo& tensor : file_->tensors()) {
    if (used_tensors_.count(tensor.name) == 0) {
      info_.ignored.push_back(absl::StrCat("tensor ", absl::CHexEscape(tensor.name)));
    }
  }
}

absl::StatusOr<CaptureSpan> ParsedCapture::FindSpan(absl::string_view name) const {
  std::vector<std::string> names;
  std::optional<CaptureSpan> found;
  for (const CaptureSpan& span : info_.spans) {
    names.push_back(span.name);
    if (span.name != name) continue;
    if (found.has_value()) {
      return FieldError(file_->label(), "span", absl::CHexEscape(name), "a name of one span only");
    }
    found = span;
  }
  if (found.has_value()) return *found;
  return absl::NotFoundError(absl::StrCat(
      file_->label(), ": span=", absl::CHexEscape(name), ", want ",
      names.empty() ? "none (the capture has no spans)"
                    : absl::StrCat("one of ", absl::CHexEscape(absl::StrJoin(names, ", ")))));
}

absl::StatusOr<std::unique_ptr<CaptureFile>> Checked(std::unique_ptr<SafetensorsFile> file) {
  auto capture = std::make_unique<ParsedCapture>(std::move(file));
  KEEPSET_RETURN_IF_ERROR(capture->Check());
  return capture;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CaptureFile>> CaptureFile::Open(const std::string& path) {
  KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                           SafetensorsFile::Open(path, ReadMode::kMap));
  return Checked(std::move(file));
}

absl::StatusOr<std::unique_ptr<CaptureFile>> CaptureFile::Parse(absl::Span<const std::byte> bytes,
                                                                absl::string_view label) {
  KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                           SafetensorsFile::Parse(bytes, label));
  return Checked(std::move(file));
}

}  // namespace keepset::tables
