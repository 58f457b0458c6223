// Arbitrary bytes as a CompressRequest: decoded, checked and, when every check passes, run on the
// CPU. Limits are small, so that an accepted request ends in microseconds.
#include <google/protobuf/stubs/logging.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "engine/operation.h"
#include "engine/policies/policy_registry.h"
#include "kernels/backend_registry.h"
#include "service/rpc/gather_codec.h"
#include "service/rpc/request_codec.h"
#include "service/rpc/result_codec.h"

namespace keepset::service {
namespace {

// Every region id names the same small read-write region.
class OneRegion final : public RegionSource, public MappedRegion {
 public:
  absl::StatusOr<const MappedRegion*> Find(absl::string_view /*region_id*/) override {
    return this;
  }
  std::byte* data() const override { return memory_.data(); }
  int64_t size_bytes() const override { return memory_.size(); }
  RegionAccess access() const override { return RegionAccess::kReadWrite; }
  absl::Status Verify() const override { return absl::OkStatus(); }

 private:
  alignas(64) mutable std::array<std::byte, 4096> memory_ = {};
};

struct Engine {
  std::unique_ptr<kernels::ComputeBackend> backend =
      *kernels::NewBackend("cpu", {.num_threads = 1});
  std::unique_ptr<engine::PolicyRegistry> policies = engine::NewBuiltinPolicyRegistry();
};

absl::Status RunRequest(Engine& engine, const v1::CompressRequest& request) {
  const CodecLimits limits = {.max_inline_bytes = 65536, .max_seq_len = 256, .max_layers = 4};
  absl::StatusOr<engine::OperationSpec> spec = DecodeSpec(request.spec(), limits);
  if (!spec.ok()) return spec.status();
  DecodeTableQuery(request.spec(), *spec, "compilerkv").status().IgnoreError();
  if (spec->model.num_qo_heads > 64 || spec->model.head_dim > 64) return absl::OkStatus();
  const absl::StatusOr<std::unique_ptr<engine::Operation>> operation =
      engine::Operation::Begin(*std::move(spec), *engine.policies, *engine.backend, SystemClock());
  if (!operation.ok()) return operation.status();
  OneRegion region;
  std::vector<DecodedLayer> layers;
  for (const v1::LayerInput& wire : request.layers()) {
    absl::StatusOr<DecodedLayer> layer = DecodeLayer(
        wire, (*operation)->spec(), request.spec().gather(), request.spec().block_table(), region);
    if (!layer.ok()) return layer.status();
    const absl::Status observed = (*operation)->Observe(wire.layer(), layer->observation);
    if (!observed.ok()) return observed;
    layers.push_back(*std::move(layer));
  }
  const absl::StatusOr<const engine::OperationResult*> result = (*operation)->Finish();
  if (!result.ok()) return result.status();
  v1::OperationResult encoded;
  EncodeResult(**result, &encoded);
  KEEPSET_CHECK(encoded.layers_size() == (*operation)->spec().model.num_layers);
  return CheckNoOverlap(layers, request.spec().gather());
}

}  // namespace
}  // namespace keepset::service

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Protobuf would report every string that is not UTF-8.
  google::protobuf::SetLogHandler(nullptr);
  static auto* const engine = new keepset::service::Engine;
  keepset::v1::CompressRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  keepset::service::RunRequest(*engine, request).IgnoreError();
  return 0;
}
