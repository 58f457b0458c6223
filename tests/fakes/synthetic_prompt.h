// Random queries, keys and values of one prompt, in any dtype and layout, with the same values as
// plain doubles for an oracle.
#ifndef KEEPSET_TESTS_FAKES_SYNTHETIC_PROMPT_H_
#define KEEPSET_TESTS_FAKES_SYNTHETIC_PROMPT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/operation_types.h"
#include "kernels/views.h"
#include "tables/decision_table.h"
#include "tables/model_fingerprint.h"
#include "tables/observation_heads_table.h"

namespace keepset::fakes {

enum class KvLayout { kHnd, kNhd, kPaged };

struct PromptShape {
  int64_t num_layers = 3;
  int64_t num_qo_heads = 4;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 16;
  int64_t seq_len = 96;
  int64_t num_rows = 8;
  kernels::DType dtype = kernels::DType::kF32;
  KvLayout layout = KvLayout::kHnd;
  uint64_t seed = 1;
};

// Every value is a multiple of 1/64 below 2 in size, so that f16 and bf16 hold it exactly.
class SyntheticPrompt {
 public:
  explicit SyntheticPrompt(const PromptShape& shape);

  const PromptShape& shape() const { return shape_; }
  tables::ModelFingerprint model() const;
  // Model, shape, scale and dtype; policy and budget are the test's.
  engine::OperationSpec spec() const;
  engine::LayerObservation observation(int64_t layer) const;
  // [H, W] log-sum-exp, natural, of the last W rows; in fp64, plus `offset`.
  std::vector<float> window_lse(int64_t layer, double offset = 0.0) const;
  // The observation with `lse` [H, W], which it views.
  engine::LayerObservation observation(int64_t layer, const std::vector<float>& lse) const;

  double q(int64_t layer, int64_t head, int64_t row, int64_t c) const;
  double k(int64_t layer, int64_t head, int64_t t, int64_t c) const;
  double v(int64_t layer, int64_t head, int64_t t, int64_t c) const;
  double softmax_scale() const;

  // Written before observation(); the layer's bytes follow.
  void set_q(int64_t layer, int64_t head, int64_t row, int64_t c, float value);
  void set_k(int64_t layer, int64_t head, int64_t t, int64_t c, float value);
  void set_v(int64_t layer, int64_t head, int64_t t, int64_t c, float value);

 private:
  struct Tensor {
    std::vector<std::byte> bytes;
  };
  int64_t KvOffset(int64_t head, int64_t t, int64_t c) const;
  int64_t QOffset(int64_t head, int64_t row, int64_t c) const;
  kernels::KvView View(const Tensor& tensor) const;
  double Load(const Tensor& tensor, int64_t element) const;
  void Store(Tensor& tensor, int64_t element, float value);

  PromptShape shape_;
  std::vector<int32_t> block_table_;
  std::vector<Tensor> q_;  // [L]
  std::vector<Tensor> k_;
  std::vector<Tensor> v_;
};

// A compilerkv table for `model`, any budget unless `budgets` names some. Head weights [L, H] and
// gates [L, E, P] of one budget are used for all; edges as given.
struct TableSample {
  std::vector<int64_t> budgets;
  std::vector<float> entropy_edges;
  std::vector<float> ppl_edges;
  std::vector<float> head_weights;     // empty: 1.0
  std::vector<float> gate_thresholds;  // empty: 0.9
};
std::shared_ptr<const tables::DecisionTable> MakeTable(const tables::ModelFingerprint& model,
                                                       const TableSample& sample);

// An observation_heads table with these observations and settings, provenance hand-written.
std::shared_ptr<const tables::DecisionTable> MakeObservationHeads(
    const tables::ModelFingerprint& model, std::vector<tables::HeadObservation> observations,
    const tables::ObservationSettings& settings);

// A table of the kind that `policy` reads: all its ways to observe the prompt itself, or weights 1.
std::shared_ptr<const tables::DecisionTable> MakeTableFor(const std::string& policy,
                                                          const tables::ModelFingerprint& model);

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_SYNTHETIC_PROMPT_H_
