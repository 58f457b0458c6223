#include "tests/fakes/synthetic_prompt.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "absl/types/span.h"
#include "base/check.h"
#include "tables/table_file.h"

namespace keepset::fakes {
namespace {

constexpr int64_t kBlockSize = 16;

// Exact for values that f16 holds as normal numbers, and for zero.
uint16_t ToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if ((bits & 0x7fffffff) == 0) return sign;
  if (!std::isfinite(value))
    return static_cast<uint16_t>(sign | (std::isnan(value) ? 0x7e00 : 0x7c00));
  const int exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + 15;
  return static_cast<uint16_t>(sign | (exponent << 10) | ((bits >> 13) & 0x3ff));
}

float FromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  if (exponent == 0) return std::bit_cast<float>(sign);
  return std::bit_cast<float>(sign | ((exponent - 15 + 127) << 23) |
                              (static_cast<uint32_t>(half & 0x3ff) << 13));
}

}  // namespace

SyntheticPrompt::SyntheticPrompt(const PromptShape& shape) : shape_(shape) {
  const int64_t bytes = kernels::DTypeBytes(shape_.dtype);
  int64_t kv_elements = shape_.num_kv_heads * shape_.seq_len * shape_.head_dim;
  if (shape_.layout == KvLayout::kPaged) {
    const int64_t num_blocks = (shape_.seq_len + kBlockSize - 1) / kBlockSize;
    for (int64_t i = 0; i < num_blocks; ++i) {
      block_table_.push_back(static_cast<int32_t>(num_blocks - 1 - i));
    }
    kv_elements = num_blocks * kBlockSize * shape_.num_kv_heads * shape_.head_dim;
  }
  const int64_t q_elements = shape_.num_qo_heads * shape_.num_rows * shape_.head_dim;
  std::mt19937_64 random(shape_.seed);
  const auto draw = [&random] {
    return static_cast<float>(static_cast<int64_t>(random() % 255) - 127) / 64.0f;
  };
  for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
    q_.push_back({std::vector<std::byte>(q_elements * bytes)});
    // 0xff bytes are NaN in every dtype: rows beyond the prompt must not matter.
    k_.push_back({std::vector<std::byte>(kv_elements * bytes, std::byte{0xff})});
    v_.push_back({std::vector<std::byte>(kv_elements * bytes, std::byte{0xff})});
    for (int64_t head = 0; head < shape_.num_qo_heads; ++head) {
      for (int64_t row = 0; row < shape_.num_rows; ++row) {
        for (int64_t c = 0; c < shape_.head_dim; ++c) set_q(layer, head, row, c, draw());
      }
    }
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
      for (int64_t t = 0; t < shape_.seq_len; ++t) {
        for (int64_t c = 0; c < shape_.head_dim; ++c) {
          set_k(layer, head, t, c, draw());
          set_v(layer, head, t, c, draw());
        }
      }
    }
  }
}

tables::ModelFingerprint SyntheticPrompt::model() const {
  tables::ModelFingerprint model;
  model.architecture = "SyntheticForCausalLM";
  model.num_layers = shape_.num_layers;
  model.num_qo_heads = shape_.num_qo_heads;
  model.num_kv_heads = shape_.num_kv_heads;
  model.head_dim = shape_.head_dim;
  return model;
}

double SyntheticPrompt::softmax_scale() const {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape_.head_dim)));
}

engine::OperationSpec SyntheticPrompt::spec() const {
  engine::OperationSpec spec;
  spec.model = model();
  spec.seq_len = shape_.seq_len;
  spec.num_rows = shape_.num_rows;
  spec.softmax_scale = static_cast<float>(softmax_scale());
  spec.kv_dtype = shape_.dtype;
  return spec;
}

std::vector<float> SyntheticPrompt::window_lse(int64_t layer, double offset) const {
  std::vector<float> lse;
  for (int64_t h = 0; h < shape_.num_qo_heads; ++h) {
    const int64_t kv_head = h / (shape_.num_qo_heads / shape_.num_kv_heads);
    for (int64_t i = 0; i < shape_.num_rows; ++i) {
      double sum = 0.0;
      for (int64_t t = 0; t <= shape_.seq_len - shape_.num_rows + i; ++t) {
        double dot = 0.0;
        for (int64_t c = 0; c < shape_.head_dim; ++c) {
          dot += q(layer, h, i, c) * k(layer, kv_head, t, c);
        }
        sum += std::exp(dot * softmax_scale());
      }
      lse.push_back(static_cast<float>(std::log(sum) + offset));
    }
  }
  return lse;
}

engine::LayerObservation SyntheticPrompt::observation(int64_t layer,
                                                      const std::vector<float>& lse) const {
  engine::LayerObservation observed = observation(layer);
  observed.window_lse.data = reinterpret_cast<const std::byte*>(lse.data());
  observed.window_lse.size_bytes = static_cast<int64_t>(lse.size() * sizeof(float));
  observed.window_lse.num_qo_heads = shape_.num_qo_heads;
  observed.window_lse.num_rows = shape_.num_rows;
  observed.window_lse.head_stride = shape_.num_rows;
  return observed;
}

engine::LayerObservation SyntheticPrompt::observation(int64_t layer) const {
  engine::LayerObservation observation;
  kernels::QueryView& q = observation.q_window;
  q.data = q_[layer].bytes.data();
  q.size_bytes = static_cast<int64_t>(q_[layer].bytes.size());
  q.dtype = shape_.dtype;
  q.num_qo_heads = shape_.num_qo_heads;
  q.num_rows = shape_.num_rows;
  q.head_dim = shape_.head_dim;
  q.head_stride = shape_.num_rows * shape_.head_dim;
  q.row_stride = shape_.head_dim;
  observation.k = View(k_[layer]);
  observation.v = View(v_[layer]);
  return observation;
}

int64_t SyntheticPrompt::QOffset(int64_t head, int64_t row, int64_t c) const {
  return (head * shape_.num_rows + row) * shape_.head_dim + c;
}

int64_t SyntheticPrompt::KvOffset(int64_t head, int64_t t, int64_t c) const {
  switch (shape_.layout) {
    case KvLayout::kHnd:
      return (head * shape_.seq_len + t) * shape_.head_dim + c;
    case KvLayout::kNhd:
      return (t * shape_.num_kv_heads + head) * shape_.head_dim + c;
    case KvLayout::kPaged:
      break;
  }
  const int64_t slot = block_table_[t / kBlockSize] * kBlockSize + t % kBlockSize;
  return (slot * shape_.num_kv_heads + head) * shape_.head_dim + c;
}

kernels::KvView SyntheticPrompt::View(const Tensor& tensor) const {
  kernels::KvView view;
  view.data = tensor.bytes.data();
  view.size_bytes = static_cast<int64_t>(tensor.bytes.size());
  view.dtype = shape_.dtype;
  view.num_kv_heads = shape_.num_kv_heads;
  view.seq_len = shape_.seq_len;
  view.head_dim = shape_.head_dim;
  const bool is_hnd = shape_.layout == KvLayout::kHnd;
  view.head_stride = is_hnd ? shape_.seq_len * shape_.head_dim : shape_.head_dim;
  view.token_stride = is_hnd ? shape_.head_dim : shape_.num_kv_heads * shape_.head_dim;
  if (shape_.layout == KvLayout::kPaged) {
    view.block_size = kBlockSize;
    view.block_stride = kBlockSize * shape_.num_kv_heads * shape_.head_dim;
    view.block_table = block_table_;
  }
  return view;
}

double SyntheticPrompt::Load(const Tensor& tensor, int64_t element) const {
  if (shape_.dtype == kernels::DType::kF32) {
    float value = 0.0f;
    std::memcpy(&value, tensor.bytes.data() + element * 4, 4);
    return value;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, tensor.bytes.data() + element * 2, 2);
  if (shape_.dtype == kernels::DType::kF16) return FromHalf(bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

void SyntheticPrompt::Store(Tensor& tensor, int64_t element, float value) {
  if (shape_.dtype == kernels::DType::kF32) {
    std::memcpy(tensor.bytes.data() + element * 4, &value, 4);
    return;
  }
  const uint16_t bits = shape_.dtype == kernels::DType::kF16
                            ? ToHalf(value)
                            : static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
  std::memcpy(tensor.bytes.data() + element * 2, &bits, 2);
}

double SyntheticPrompt::q(int64_t layer, int64_t head, int64_t row, int64_t c) const {
  return Load(q_[layer], QOffset(head, row, c));
}
double SyntheticPrompt::k(int64_t layer, int64_t head, int64_t t, int64_t c) const {
  return Load(k_[layer], KvOffset(head, t, c));
}
double SyntheticPrompt::v(int64_t layer, int64_t head, int64_t t, int64_t c) const {
  return Load(v_[layer], KvOffset(head, t, c));
}
void SyntheticPrompt::set_q(int64_t layer, int64_t head, int64_t row, int64_t c, float value) {
  Store(q_[layer], QOffset(head, row, c), value);
}
void SyntheticPrompt::set_k(int64_t layer, int64_t head, int64_t t, int64_t c, float value) {
  Store(k_[layer], KvOffset(head, t, c), value);
}
void SyntheticPrompt::set_v(int64_t layer, int64_t head, int64_t t, int64_t c, float value) {
  Store(v_[layer], KvOffset(head, t, c), value);
}

namespace {

std::shared_ptr<const tables::DecisionTable> Parsed(const absl::StatusOr<std::string>& file) {
  KEEPSET_CHECK(file.ok());
  auto table = tables::ParseTable(
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(file->data()), file->size()),
      "sample");
  KEEPSET_CHECK(table.ok());
  return *std::move(table);
}

}  // namespace

std::shared_ptr<const tables::DecisionTable> MakeTable(const tables::ModelFingerprint& model,
                                                       const TableSample& sample) {
  const int64_t entropy_bins = static_cast<int64_t>(sample.entropy_edges.size()) + 1;
  const int64_t ppl_bins = static_cast<int64_t>(sample.ppl_edges.size()) + 1;
  std::vector<float> weights = sample.head_weights;
  if (weights.empty()) weights.assign(model.num_layers * model.num_qo_heads, 1.0f);
  std::vector<float> gates = sample.gate_thresholds;
  if (gates.empty()) gates.assign(model.num_layers * entropy_bins * ppl_bins, 0.9f);

  tables::CompilerKvTableContent content;
  content.name = "sample";
  content.version = "1";
  content.model = model;
  content.budgets = sample.budgets;
  content.entropy_edges = sample.entropy_edges;
  content.ppl_edges = sample.ppl_edges;
  content.provenance_json = R"({"source": "hand-written"})";
  const size_t copies = sample.budgets.empty() ? 1 : sample.budgets.size();
  for (size_t i = 0; i < copies; ++i) {
    content.head_weights.insert(content.head_weights.end(), weights.begin(), weights.end());
    content.gate_thresholds.insert(content.gate_thresholds.end(), gates.begin(), gates.end());
  }
  return Parsed(tables::SerializeTable(content));
}

std::shared_ptr<const tables::DecisionTable> MakeObservationHeads(
    const tables::ModelFingerprint& model, std::vector<tables::HeadObservation> observations,
    const tables::ObservationSettings& settings) {
  tables::ObservationHeadsContent content;
  content.name = "heads";
  content.version = "1";
  content.model = model;
  content.observations = std::move(observations);
  content.settings = settings;
  content.provenance_json = R"({"source": "hand-written"})";
  return Parsed(tables::SerializeTable(content));
}

std::shared_ptr<const tables::DecisionTable> MakeTableFor(const std::string& policy,
                                                          const tables::ModelFingerprint& model) {
  using tables::ObservedRows;
  if (policy != "observation_heads") return MakeTable(model, {});
  tables::ObservationSettings settings;
  settings.pool_kernel = 3;
  settings.dilate = 2;
  return MakeObservationHeads(model,
                              {{0, 1, ObservedRows::kLastRow, 0.5f},
                               {0, 1, ObservedRows::kMaxRows, 1.0f},
                               {1, 1, ObservedRows::kKeyNovelty, 0.25f},
                               {2, 3, ObservedRows::kMeanRows, 0.75f}},
                              settings);
}

}  // namespace keepset::fakes
