#include "service/rpc/short_operation.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace keepset::service {
namespace {

// About a tenth of a millisecond of one core.
constexpr double kMaxMultiplyAdds = 4 << 20;
// What is done with a score after its dot product counts as a head of this many channels at least.
constexpr uint64_t kMinHeadDim = 64;
// Entries of a list, and text to be parsed, that take no time beside it.
constexpr int kMaxListed = 1024;
constexpr size_t kMaxJsonBytes = 4096;

// In floating point: the numbers are a client's and not checked yet.
double Factor(uint64_t value, uint64_t at_least = 1) {
  return static_cast<double>(std::max(value, at_least));
}

// Whether nothing that a request lists is beyond what the sizes above bound.
bool ListsLittle(const v1::OperationSpec& spec) {
  return spec.protect_spans_size() <= kMaxListed && spec.parameters_size() <= kMaxListed &&
         spec.window_logprobs_size() <= kMaxListed && spec.layer_groups_size() <= kMaxListed &&
         spec.model().rope_json().size() <= kMaxJsonBytes;
}

// The scores of the observed rows, and one pass each over K and V: value norms, kept rows.
double MultiplyAdds(const v1::OperationSpec& spec) {
  const v1::ModelFingerprint& model = spec.model();
  const double rows =
      Factor(model.num_qo_heads()) * Factor(spec.num_rows()) + 2 * Factor(model.num_kv_heads());
  return Factor(model.num_layers()) * Factor(spec.seq_len()) * rows *
         Factor(std::max<uint64_t>(model.head_dim(), spec.value_head_dim()), kMinHeadDim);
}

}  // namespace

bool IsShort(const v1::OperationSpec& spec, const kernels::DeviceInfo& device) {
  const bool computes_on_host = device.uuid.empty();
  return computes_on_host && !spec.has_shadow_table() && ListsLittle(spec) &&
         MultiplyAdds(spec) <= kMaxMultiplyAdds;
}

}  // namespace keepset::service
