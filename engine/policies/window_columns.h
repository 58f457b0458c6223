// The observation stage of every policy that scores by attention: rows to column mass.
#ifndef KEEPSET_ENGINE_POLICIES_WINDOW_COLUMNS_H_
#define KEEPSET_ENGINE_POLICIES_WINDOW_COLUMNS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/operation_types.h"
#include "engine/policies/retention_policy.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

// Belongs to one policy. Its buffers serve every call.
class WindowStage {
 public:
  enum class ValueNorms { kNone, kWanted };

  // The last `num_rows` observed rows count: 1..W. Makes the buffers of one layer.
  absl::Status Begin(const PolicyContext& context, int64_t num_rows, ValueNorms value_norms);

  // columns(i)[h, t] = mean over the rows of the attention of layers[i] on t. A tile wins over
  // queries; a given log-sum-exp is used with queries. Column statistics are those of exactly
  // `num_rows` rows. Layers that bring queries go to the backend together.
  absl::Status Run(PolicyContext& context, absl::Span<const ObservedLayer> layers);

  // Of the last Run.
  kernels::ScoreBuffer& columns(size_t i) const { return *buffers_[i].columns; }  // [H, T]
  kernels::ScoreBuffer& value_norms(size_t i) const {
    return *buffers_[i].value_norms;
  }  // [Hkv, T]

 private:
  struct Buffers {
    std::unique_ptr<kernels::ScoreBuffer> columns;
    std::unique_ptr<kernels::ScoreBuffer> value_norms;  // null when none are wanted
  };

  absl::Status Reserve(const PolicyContext& context, size_t num_layers);
  absl::Status RunTile(PolicyContext& context, const ObservedLayer& layer, const Buffers& buffers);

  int64_t num_rows_ = 0;
  ValueNorms wanted_ = ValueNorms::kNone;
  std::vector<Buffers> buffers_;  // one per layer of the largest call
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_POLICIES_WINDOW_COLUMNS_H_
