#ifndef KEEPSET_ENGINE_KEPT_ROWS_H_
#define KEEPSET_ENGINE_KEPT_ROWS_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/operation_plan.h"
#include "engine/operation_types.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

// Moves the rows of K and V that an operation keeps. Owns nothing: plan, results and backend
// outlive it, and the results stand before anything moves. Layers are in range. Errors name layer
// and tensor.
class KeptRows {
 public:
  KeptRows(const OperationPlan& plan, const std::vector<LayerResult>& layers,
           kernels::ComputeBackend& backend)
      : plan_(plan), layers_(layers), backend_(backend) {}

  // To other memory, all layers together.
  absl::Status Gather(absl::Span<const LayerGather> layers) const;

  // Whether views fit the model. InvalidArgument.
  absl::Status CheckInPlace(const LayerInPlace& one) const;
  // Takes what MoveInPlace of checked layers needs of the backend's memory.
  absl::Status ReserveInPlace(absl::Span<const LayerInPlace> layers) const;
  // Of a reserved layer. After any error its K and V may be half moved.
  absl::Status MoveInPlace(const LayerInPlace& one) const;

 private:
  absl::Status CheckTensorInPlace(const kernels::MutableKvView& view, int64_t head_dim,
                                  absl::string_view what) const;
  std::vector<absl::Span<const int32_t>> SetsOf(int64_t layer) const;

  const OperationPlan& plan_;
  const std::vector<LayerResult>& layers_;
  kernels::ComputeBackend& backend_;
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_KEPT_ROWS_H_
