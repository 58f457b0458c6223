#include "service/rpc/gather_codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"

namespace keepset::service {
namespace {

enum class Role : uint8_t { kSource, kDestination };

// Bytes [begin, end) of this process that one tensor may touch.
struct Extent {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  Role role = Role::kSource;
  const char* name = "";
  size_t layer = 0;
};

template <typename View>
void AddExtents(const View& view, Role role, const char* name, size_t layer,
                std::vector<Extent>& extents) {
  if (!view.present()) return;
  const auto base = std::bit_cast<uintptr_t>(view.data);
  const int64_t element_bytes = kernels::DTypeBytes(view.dtype);
  // No tensor is longer than its one block.
  const int64_t tokens =
      view.block_size > 0 ? std::min(view.block_size, view.seq_len) : view.seq_len;
  const int64_t last =
      (tokens - 1) * view.token_stride + (view.num_kv_heads - 1) * view.head_stride + view.head_dim;
  if (view.block_size == 0) {
    extents.push_back({base, base + last * element_bytes, role, name, layer});
    return;
  }
  for (const int32_t block : view.block_table) {
    const uintptr_t begin = base + block * view.block_stride * element_bytes;
    extents.push_back({begin, begin + last * element_bytes, role, name, layer});
  }
}

}  // namespace

int64_t InlineGatherBytes(const kernels::KvView& source, int64_t rows) {
  return source.num_kv_heads * rows * source.head_dim * kernels::DTypeBytes(source.dtype);
}

kernels::MutableKvView InlineDestination(const kernels::KvView& source, int64_t rows,
                                         std::string* bytes) {
  bytes->resize(InlineGatherBytes(source, rows));
  kernels::MutableKvView view;
  view.data = reinterpret_cast<std::byte*>(bytes->data());
  view.size_bytes = static_cast<int64_t>(bytes->size());
  view.dtype = source.dtype;
  view.num_kv_heads = source.num_kv_heads;
  view.seq_len = rows;
  view.head_dim = source.head_dim;
  view.token_stride = source.head_dim;
  view.head_stride = rows * source.head_dim;
  return view;
}

void CloseGaps(const engine::LayerResult& result, int64_t rows, int64_t row_bytes,
               std::string* bytes) {
  size_t end = 0;
  for (size_t g = 0; g < result.keep_indices.size(); ++g) {
    const size_t used = result.keep_indices[g].size() * row_bytes;
    std::memmove(bytes->data() + end, bytes->data() + g * rows * row_bytes, used);
    end += used;
  }
  bytes->resize(end);
}

absl::Status CheckNoOverlap(absl::Span<const DecodedLayer> layers, v1::GatherMode mode) {
  std::vector<Extent> extents;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (mode == v1::GATHER_IN_PLACE) {
      AddExtents(layers[l].out_k, Role::kDestination, "k", l, extents);
      AddExtents(layers[l].out_v, Role::kDestination, "v", l, extents);
      continue;
    }
    AddExtents(layers[l].observation.k, Role::kSource, "k", l, extents);
    AddExtents(layers[l].observation.v, Role::kSource, "v", l, extents);
    AddExtents(layers[l].out_k, Role::kDestination, "destination.k", l, extents);
    AddExtents(layers[l].out_v, Role::kDestination, "destination.v", l, extents);
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  // Sweep from low to high addresses; sources may share bytes with each other.
  const Extent* source = nullptr;       // the source that reaches furthest so far
  const Extent* destination = nullptr;  // the destination that reaches furthest so far
  for (const Extent& extent : extents) {
    const Extent* clash = nullptr;
    if (destination != nullptr && destination->end > extent.begin) clash = destination;
    if (extent.role == Role::kDestination && source != nullptr && source->end > extent.begin) {
      clash = source;
    }
    if (clash != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", extent.layer, ": ", extent.name,
                                                     " shares bytes with layer ", clash->layer,
                                                     ": ", clash->name, ", want disjoint memory"));
    }
    const Extent*& furthest = extent.role == Role::kSource ? source : destination;
    if (furthest == nullptr || extent.end > furthest->end) furthest = &extent;
  }
  return absl::OkStatus();
}

}  // namespace keepset::service
