#include "engine/kept_rows.h"

#include <new>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/spec_check.h"
#include "kernels/op_checks.h"

namespace keepset::engine {
namespace {

std::string InPlaceName(int64_t layer) {
  return absl::StrCat("layer ", layer, ": gather in place of ");
}

// A tensor to gather, with what its task only borrows.
struct Source {
  kernels::KvView in;
  kernels::MutableKvView out;
  std::string what;
  std::vector<absl::Span<const int32_t>> sets;
};

absl::Status CheckSource(const OperationSpec& spec, int64_t head_dim, const Source& source) {
  if (!source.in.present() || !source.out.present()) {
    return absl::InvalidArgumentError(
        absl::StrCat(source.what, ": missing ", source.in.present() ? "destination" : "source"));
  }
  KEEPSET_RETURN_IF_ERROR(CheckKv(spec, source.in, head_dim, source.what));
  return kernels::ValidateView(source.out, absl::StrCat(source.what, ": destination"));
}

}  // namespace

absl::Status KeptRows::Gather(absl::Span<const LayerGather> layers) const {
  std::vector<Source> sources;
  sources.reserve(2 * layers.size());
  for (const LayerGather& one : layers) {
    const std::string where = absl::StrCat("layer ", one.layer, ": gather of ");
    sources.push_back({one.k, one.out_k, where + "k", SetsOf(one.layer)});
    KEEPSET_RETURN_IF_ERROR(CheckSource(plan_.spec, plan_.spec.model.head_dim, sources.back()));
    sources.push_back({one.v, one.out_v, where + "v", SetsOf(one.layer)});
    KEEPSET_RETURN_IF_ERROR(CheckSource(plan_.spec, ValueHeadDim(plan_.spec), sources.back()));
  }
  std::vector<kernels::GatherTask> tasks;
  tasks.reserve(sources.size());
  for (const Source& source : sources) {
    tasks.push_back({source.in, source.sets, source.out, source.what});
  }
  return backend_.GatherRowsOfEach(*plan_.op_context, tasks);
}

absl::Status KeptRows::CheckInPlace(const LayerInPlace& one) const {
  const std::string where = InPlaceName(one.layer);
  KEEPSET_RETURN_IF_ERROR(CheckTensorInPlace(one.k, plan_.spec.model.head_dim, where + "k"));
  return CheckTensorInPlace(one.v, ValueHeadDim(plan_.spec), where + "v");
}

absl::Status KeptRows::ReserveInPlace(absl::Span<const LayerInPlace> layers) const {
  std::vector<std::vector<absl::Span<const int32_t>>> sets;
  for (const LayerInPlace& one : layers) sets.push_back(SetsOf(one.layer));
  std::vector<kernels::CompactTask> tasks;
  for (size_t i = 0; i < layers.size(); ++i) {
    tasks.push_back({sets[i], layers[i].k});
    tasks.push_back({sets[i], layers[i].v});
  }
  return backend_.ReserveCompaction(*plan_.op_context, tasks);
}

absl::Status KeptRows::MoveInPlace(const LayerInPlace& one) const {
  const std::string k = InPlaceName(one.layer) + "k";
  const std::string v = InPlaceName(one.layer) + "v";
  const std::vector<absl::Span<const int32_t>> sets = SetsOf(one.layer);
  // Made while there is memory.
  absl::Status lost = absl::DataLossError(absl::StrCat(
      InPlaceName(one.layer), "k and v: out of memory while rows moved, compute them again"));
  try {
    KEEPSET_RETURN_IF_ERROR(
        kernels::NamedBy(k, backend_.CompactRows(*plan_.op_context, sets, one.k)));
    return kernels::NamedBy(v, backend_.CompactRows(*plan_.op_context, sets, one.v));
  } catch (const std::bad_alloc&) {
    return lost;
  }
}

absl::Status KeptRows::CheckTensorInPlace(const kernels::MutableKvView& view, int64_t head_dim,
                                          absl::string_view what) const {
  if (!view.present()) return absl::InvalidArgumentError(absl::StrCat(what, ": missing"));
  KEEPSET_RETURN_IF_ERROR(CheckKv(plan_.spec, kernels::Readable(view), head_dim, what));
  return kernels::ValidateView(view, what);
}

std::vector<absl::Span<const int32_t>> KeptRows::SetsOf(int64_t layer) const {
  std::vector<absl::Span<const int32_t>> sets;
  for (const std::vector<int32_t>& set : layers_[layer].keep_indices) sets.emplace_back(set);
  return sets;
}

}  // namespace keepset::engine
