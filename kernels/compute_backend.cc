#include "kernels/compute_backend.h"

#include <utility>

#include "base/status_macros.h"
#include "kernels/op_checks.h"

namespace keepset::kernels {

absl::Status ComputeBackend::WindowColumnsOfLayers(OpContext& context,
                                                   absl::Span<const WindowArgs> layers,
                                                   absl::Span<ScoreBuffer* const> outs) {
  KEEPSET_RETURN_IF_ERROR(CheckLayerCount(layers, outs));
  for (size_t i = 0; i < layers.size(); ++i) {
    KEEPSET_RETURN_IF_ERROR(WindowColumns(context, layers[i], *outs[i]));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ComputeBackend::Mass>> ComputeBackend::MassAndEntropyOfEach(
    OpContext& context, absl::Span<const ScoreBuffer* const> buffers) {
  std::vector<Mass> masses;
  for (const ScoreBuffer* const buffer : buffers) {
    KEEPSET_ASSIGN_OR_RETURN(const Mass mass, MassAndEntropy(context, *buffer, /*row=*/0));
    masses.push_back(mass);
  }
  return masses;
}

absl::StatusOr<std::vector<std::vector<Selection>>> ComputeBackend::SelectEach(
    OpContext& context, absl::Span<const SelectTask> tasks) {
  std::vector<std::vector<Selection>> selections;
  for (const SelectTask& task : tasks) {
    KEEPSET_ASSIGN_OR_RETURN(std::vector<Selection> one, Select(context, *task.scores, task.args));
    selections.push_back(std::move(one));
  }
  return selections;
}

absl::Status ComputeBackend::GatherRowsOfEach(OpContext& context,
                                              absl::Span<const GatherTask> tasks) {
  for (const GatherTask& task : tasks) {
    KEEPSET_RETURN_IF_ERROR(
        NamedBy(task.what, GatherRows(context, task.in, task.keep_indices, task.out)));
  }
  return absl::OkStatus();
}

}  // namespace keepset::kernels
