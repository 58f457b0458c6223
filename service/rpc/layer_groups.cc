#include "service/rpc/layer_groups.h"

#include <algorithm>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::service {
namespace {

constexpr uint32_t kMaxLayers = 16384;

absl::Status CheckGroup(const v1::LayerGroup& group, absl::string_view where) {
  const int kind = static_cast<int>(group.attention());
  if (kind == v1::ATTENTION_KIND_UNSPECIFIED || !v1::AttentionKind_IsValid(kind)) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": attention=", kind, ", want ",
                                                   v1::ATTENTION_KIND_FULL, "..",
                                                   v1::AttentionKind_MAX));
  }
  if (group.layers().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": no layers, want at least one"));
  }
  const bool slides = group.attention() == v1::ATTENTION_KIND_SLIDING_WINDOW;
  if (slides != (group.window() > 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": window=", group.window(), ", want ",
                     slides ? "the positions that a row sees" : "0 without a sliding window"));
  }
  if (group.attention() == v1::ATTENTION_KIND_FULL || group.left_out()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      where, ": layer ", group.layers(0), " is of ", v1::AttentionKind_Name(group.attention()),
      ", want it left_out: only full attention is compressed"));
}

}  // namespace

absl::StatusOr<std::vector<uint32_t>> LayersLeftOut(const v1::OperationSpec& wire) {
  std::vector<uint32_t> left_out;
  if (wire.layer_groups().empty()) return left_out;
  std::vector<uint32_t> all;
  for (int i = 0; i < wire.layer_groups_size(); ++i) {
    const v1::LayerGroup& group = wire.layer_groups(i);
    KEEPSET_RETURN_IF_ERROR(CheckGroup(group, absl::StrCat("layer_groups[", i, "]")));
    if (all.size() + group.layers_size() > kMaxLayers) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer_groups: more than ", kMaxLayers, " layers, want fewer"));
    }
    all.insert(all.end(), group.layers().begin(), group.layers().end());
    if (group.left_out()) {
      left_out.insert(left_out.end(), group.layers().begin(), group.layers().end());
    }
  }
  std::sort(all.begin(), all.end());
  for (uint32_t layer = 0; layer < all.size(); ++layer) {
    if (all[layer] == layer) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("layer_groups: layer ", std::min(all[layer], layer),
                     all[layer] < layer ? " is in two groups" : " is in no group",
                     ", want each of the model's layers in one"));
  }
  const size_t taking_part = all.size() - left_out.size();
  if (taking_part != wire.model().num_layers()) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer_groups: ", taking_part,
                     " layers take part, want model.num_layers=", wire.model().num_layers()));
  }
  std::sort(left_out.begin(), left_out.end());
  return left_out;
}

}  // namespace keepset::service
