#include "engine/device_bytes.h"

#include <bit>
#include <cstddef>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "engine/operation.h"
#include "engine/spec_check.h"
#include "kernels/writable_view.h"

namespace keepset::engine {
namespace {

constexpr int64_t kPageTokens = 16;
// Tensors that nobody has lie apart from each other, above what a process can address.
constexpr uintptr_t kFirstTensor = uintptr_t{1} << 58;
constexpr uintptr_t kTensorBytes = uintptr_t{1} << 44;

// What the layers of one operation bring and where their rows go. `spec` has been checked, and
// outlives it.
class Tensors {
 public:
  Tensors(const OperationSpec& spec, const std::optional<LayerObservation>& layer)
      : spec_(spec), pages_(static_cast<size_t>((spec.seq_len + kPageTokens - 1) / kPageTokens)) {
    std::iota(pages_.begin(), pages_.end(), 0);
    layer_ = layer.has_value() ? *layer : AllInPages();
    k_ = layer_.k.present() ? layer_.k : Paged(spec.model.head_dim);
    v_ = layer_.v.present() ? layer_.v : Paged(ValueHeadDim(spec));
  }

  std::vector<ObservedLayer> Layers() const {
    std::vector<ObservedLayer> layers;
    for (int64_t layer = 0; layer < num_layers(); ++layer) layers.push_back({layer, layer_});
    return layers;
  }
  std::vector<LayerGather> Gathers() {
    std::vector<LayerGather> gathers;
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      gathers.push_back(
          {layer, k_, v_, kernels::WritableLike(k_, Next()), kernels::WritableLike(v_, Next())});
    }
    return gathers;
  }
  std::vector<LayerInPlace> Moves() {
    std::vector<LayerInPlace> moves;
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      moves.push_back(
          {layer, kernels::WritableLike(k_, Next()), kernels::WritableLike(v_, Next())});
    }
    return moves;
  }

 private:
  int64_t num_layers() const { return spec_.model.num_layers; }
  std::byte* Next() { return std::bit_cast<std::byte*>(kFirstTensor + kTensorBytes * count_++); }

  LayerObservation AllInPages() {
    LayerObservation layer;
    const int64_t rows = spec_.row_positions.empty()
                             ? spec_.num_rows
                             : static_cast<int64_t>(spec_.row_positions.size());
    if (rows > 0) {
      kernels::QueryView& q = layer.q_window;
      q.data = Next();
      q.dtype = spec_.kv_dtype;
      q.num_qo_heads = spec_.model.num_qo_heads;
      q.num_rows = rows;
      q.head_dim = spec_.model.head_dim;
      q.row_stride = q.head_dim;
      q.head_stride = rows * q.head_dim;
      q.size_bytes = q.num_qo_heads * q.head_stride * kernels::DTypeBytes(q.dtype);
    }
    layer.k = Paged(spec_.model.head_dim);
    layer.v = Paged(ValueHeadDim(spec_));
    return layer;
  }
  kernels::KvView Paged(int64_t head_dim) {
    kernels::KvView view;
    view.data = Next();
    view.dtype = spec_.kv_dtype;
    view.num_kv_heads = spec_.model.num_kv_heads;
    view.seq_len = spec_.seq_len;
    view.head_dim = head_dim;
    view.head_stride = head_dim;
    view.token_stride = view.num_kv_heads * head_dim;
    view.block_size = kPageTokens;
    view.block_stride = kPageTokens * view.token_stride;
    view.block_table = pages_;
    view.size_bytes =
        static_cast<int64_t>(pages_.size()) * view.block_stride * kernels::DTypeBytes(view.dtype);
    return view;
  }

  const OperationSpec& spec_;
  std::vector<int32_t> pages_;
  uintptr_t count_ = 0;
  LayerObservation layer_;
  kernels::KvView k_;
  kernels::KvView v_;
};

// One operation from its first layer to its last row.
class Passage {
 public:
  Passage(Handover handover, Tensors& tensors, Operation& operation)
      : handover_(handover), tensors_(tensors), operation_(operation) {}

  absl::Status Observe() {
    return ForEach<ObservedLayer>(tensors_.Layers(), [this](absl::Span<const ObservedLayer> some) {
      return operation_.ObserveLayers(some);
    });
  }
  absl::Status Gather() {
    return ForEach<LayerGather>(tensors_.Gathers(), [this](absl::Span<const LayerGather> some) {
      return operation_.GatherLayers(some);
    });
  }
  absl::Status MoveInPlace() {
    return ForEach<LayerInPlace>(
        tensors_.Moves(), [this](absl::Span<const LayerInPlace> some) -> absl::Status {
          KEEPSET_RETURN_IF_ERROR(operation_.ReserveInPlace(some));
          for (const LayerInPlace& one : some) {
            KEEPSET_RETURN_IF_ERROR(operation_.GatherInPlace(one.layer, one.k, one.v));
          }
          return absl::OkStatus();
        });
  }

 private:
  // Calls `work` with all layers, or with one after the other.
  template <typename Layer>
  absl::Status ForEach(const std::vector<Layer>& layers,
                       absl::FunctionRef<absl::Status(absl::Span<const Layer>)> work) {
    if (handover_ == Handover::kTogether) return work(layers);
    for (const Layer& layer : layers) {
      KEEPSET_RETURN_IF_ERROR(work(absl::MakeConstSpan(&layer, 1)));
    }
    return absl::OkStatus();
  }

  const Handover handover_;
  Tensors& tensors_;
  Operation& operation_;
};

absl::Status GoThrough(OperationSpec spec, const DeviceBytesOptions& options,
                       const PolicyRegistry& policies, kernels::ComputeBackend& measure) {
  const RowMove row_move = spec.mode == Mode::kShadow ? RowMove::kNone : options.row_move;
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation,
                           Operation::Begin(std::move(spec), policies, measure, SystemClock()));
  Tensors tensors(operation->spec(), options.layer);
  Passage passage(options.handover, tensors, *operation);
  KEEPSET_RETURN_IF_ERROR(passage.Observe());
  KEEPSET_RETURN_IF_ERROR(operation->Finish().status());
  if (row_move == RowMove::kGather) KEEPSET_RETURN_IF_ERROR(passage.Gather());
  if (row_move == RowMove::kInPlace) KEEPSET_RETURN_IF_ERROR(passage.MoveInPlace());
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<ShadowDecision> shadow, operation->TakeShadow());
  return shadow == nullptr ? absl::OkStatus() : shadow->Finish().status();
}

}  // namespace

absl::StatusOr<int64_t> DeviceBytes(OperationSpec spec, const DeviceBytesOptions& options,
                                    const PolicyRegistry& policies,
                                    const kernels::ComputeBackend& backend) {
  const std::unique_ptr<kernels::ComputeBackend> measure = backend.NewMeasure();
  // Of host memory an operation takes none of the device's, whatever is wrong with it.
  if (measure == nullptr) return 0;
  spec.device_stream = nullptr;
  spec.on_short_memory = OnShortMemory::kFail;
  spec.deadline = absl::InfiniteDuration();
  KEEPSET_RETURN_IF_ERROR(GoThrough(std::move(spec), options, policies, *measure));
  return measure->MemoryUse().peak_bytes;
}

}  // namespace keepset::engine
