#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "kernels/cuda/callers_stream.h"
#include "kernels/cuda/cublas_file.h"
#include "kernels/cuda/cublas_products.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/current_device.h"
#include "kernels/cuda/device_region.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/window_scores.h"
#include "kernels/op_checks.h"

namespace keepset::kernels {
namespace {

// Memory that is kept although no operation uses it; beside an engine every byte counts.
constexpr int64_t kMostKeptBytes = int64_t{1} << 30;
// The kernels use instructions of this architecture.
constexpr int kLeastMajor = 8;

std::string VersionText(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

// Why cudaGetDeviceCount found nothing. A driver that is too old answers like none at all.
std::string WhyNoDevice(cudaError_t error) {
  int driver_version = 0;
  int runtime_version = 0;
  if (error != cudaErrorInsufficientDriver ||
      cudaDriverGetVersion(&driver_version) != cudaSuccess ||
      cudaRuntimeGetVersion(&runtime_version) != cudaSuccess) {
    return error == cudaSuccess ? "the driver lists none" : cudaGetErrorString(error);
  }
  if (driver_version == 0) return "no CUDA driver is installed";
  return absl::StrCat("the driver supports CUDA ", VersionText(driver_version), ", want ",
                      VersionText(runtime_version), " or later: update the driver");
}

// A context's stream, while the device is current on this thread.
class Entered {
 public:
  Entered(cuda::CurrentDevice device, cuda::StreamState* state)
      : device_(std::move(device)), state_(state) {}
  cuda::StreamState& operator*() const { return *state_; }
  cuda::StreamState* operator->() const { return state_; }

 private:
  cuda::CurrentDevice device_;
  cuda::StreamState* state_;
};

class CudaBackend : public ComputeBackend {
 public:
  CudaBackend() : pool_(0, health_, kMostKeptBytes), streams_(traits_, health_, pool_) {}

  absl::Status Init(cuda::WindowKernels window_kernels, const std::string& cublas_library) {
    KEEPSET_ASSIGN_OR_RETURN(const cuda::CurrentDevice current,
                             cuda::CurrentDevice::Set(traits_.ordinal, health_));
    int major = 0;
    int minor = 0;
    int shared_bytes = 0;
    int l2_bytes = 0;
    int multiprocessors = 0;
    KEEPSET_RETURN_IF_ERROR(ReadAttribute(cudaDevAttrComputeCapabilityMajor, &major));
    KEEPSET_RETURN_IF_ERROR(ReadAttribute(cudaDevAttrComputeCapabilityMinor, &minor));
    KEEPSET_RETURN_IF_ERROR(ReadAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes));
    KEEPSET_RETURN_IF_ERROR(ReadAttribute(cudaDevAttrL2CacheSize, &l2_bytes));
    KEEPSET_RETURN_IF_ERROR(ReadAttribute(cudaDevAttrMultiProcessorCount, &multiprocessors));
    traits_.multiprocessors = multiprocessors;
    traits_.architecture = absl::StrCat("sm_", major, minor);
    traits_.max_shared_bytes = shared_bytes;
    traits_.l2_bytes = l2_bytes;
    KEEPSET_RETURN_IF_ERROR(ReadDevice());
    if (major < kLeastMajor) {
      return absl::FailedPreconditionError(absl::StrCat(
          "cuda: device ", traits_.ordinal, " is ", traits_.architecture, ", want sm_80 or later"));
    }
    if (window_kernels == cuda::WindowKernels::kPortable) return absl::OkStatus();
    if (window_kernels == cuda::WindowKernels::kCublas) return LoadCublas(cublas_library);
    return FindHopperKernels();
  }

  // Before the first context and buffer; options are checked.
  absl::Status ReserveMemory(const BackendOptions& options) {
    if (options.device_memory_bytes == 0) return absl::OkStatus();
    KEEPSET_ASSIGN_OR_RETURN(const cuda::CurrentDevice current,
                             cuda::CurrentDevice::Set(traits_.ordinal, health_));
    KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<cuda::DeviceRegion> region,
                             cuda::DeviceRegion::New(options, traits_.ordinal, health_));
    pool_.UseRegion(std::move(region));
    return absl::OkStatus();
  }

  std::string name() const override { return absl::StrCat("cuda/", traits_.architecture); }
  std::string NameFor(const OpContext& context) const override {
    const cuda::StreamState& state = static_cast<const cuda::CudaContext&>(context).state();
    if (state.HasUsed(cuda::WindowKernels::kCublas)) return absl::StrCat(name(), "/cublas");
    if (!state.HasUsed(cuda::WindowKernels::kHopper)) return name();
    return absl::StrCat(
        name(), state.HasUsed(cuda::WindowKernels::kPortable) ? "/wgmma+portable" : "/wgmma");
  }
  DeviceInfo Device() const override { return device_; }
  std::unique_ptr<ComputeBackend> NewMeasure() const override {
    auto measure = std::make_unique<CudaBackend>();
    measure->device_ = device_;
    measure->traits_ = traits_;
    measure->traits_.execution = cuda::Execution::kNone;
    measure->pool_.UseRegion(cuda::DeviceRegion::NewOfNoMemory(measure->health_));
    return measure;
  }
  absl::Status Health() const override { return health_.status(); }
  DeviceMemoryUse MemoryUse() const override { return pool_.use(); }

  absl::StatusOr<std::unique_ptr<OpContext>> NewContext(const ContextOptions& options) override {
    KEEPSET_RETURN_IF_ERROR(health_.status());
    KEEPSET_ASSIGN_OR_RETURN(const cuda::CurrentDevice current,
                             cuda::CurrentDevice::Set(traits_.ordinal, health_));
    auto* const stream = static_cast<cudaStream_t>(options.stream);
    KEEPSET_RETURN_IF_ERROR(cuda::CheckCallersStream(stream, traits_.ordinal, health_));
    return std::make_unique<cuda::CudaContext>(&streams_, streams_.Acquire(stream));
  }

  int64_t layers_at_once() const override { return cuda::kMaxWindowLayers; }

  absl::StatusOr<std::unique_ptr<ScoreBuffer>> NewBuffer(int64_t rows, int64_t cols) override {
    int64_t bytes = 0;
    if (rows < 1 || cols < 1 || __builtin_mul_overflow(rows, cols, &bytes) ||
        __builtin_mul_overflow(bytes, int64_t{sizeof(float)}, &bytes)) {
      return absl::InvalidArgumentError(absl::StrCat("score buffer: shape [", rows, ", ", cols,
                                                     "], want >= 1 and within memory"));
    }
    KEEPSET_ASSIGN_OR_RETURN(cuda::DeviceBlock block, pool_.Acquire(bytes));
    return std::make_unique<cuda::CudaScoreBuffer>(std::move(block), rows, cols);
  }

  absl::Status WindowColumns(OpContext& context, const WindowArgs& args,
                             ScoreBuffer& out) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::WindowColumns(*state, args, out);
  }
  absl::Status WindowColumnsOfLayers(OpContext& context, absl::Span<const WindowArgs> layers,
                                     absl::Span<ScoreBuffer* const> outs) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::WindowColumnsOfLayers(*state, layers, outs);
  }
  absl::Status TileColumns(OpContext& context, const TileArgs& args, ScoreBuffer& out) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::TileColumns(*state, args, out);
  }
  absl::Status RowNorms(OpContext& context, const KvView& x, absl::string_view what,
                        ScoreBuffer& out) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::RowNorms(*state, x, what, out);
  }
  absl::Status KeyNovelty(OpContext& context, const KvView& k, absl::Span<const int64_t> kv_heads,
                          absl::string_view what, ScoreBuffer& out) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::KeyNovelty(*state, k, kv_heads, what, out);
  }
  absl::Status NormalizeRows(OpContext& context, Normalization normalization,
                             absl::Span<const SelectArgs::Range> excluded,
                             ScoreBuffer& x) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::NormalizeRows(*state, normalization, excluded, x);
  }
  absl::Status DivideByRowMean(OpContext& context, float eps, ScoreBuffer& x) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::DivideByRowMean(*state, eps, x);
  }
  absl::Status MergeRows(OpContext& context, const ScoreBuffer& in, Merge merge,
                         absl::Span<const float> weights, ScoreBuffer& out) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::MergeRows(*state, in, merge, weights, out);
  }
  absl::Status Accumulate(OpContext& context, const ScoreBuffer& x, Merge merge, float weight,
                          ScoreBuffer& acc) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::Accumulate(*state, x, merge, weight, acc);
  }
  absl::Status Multiply(OpContext& context, const ScoreBuffer& y, float factor,
                        ScoreBuffer& x) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::Multiply(*state, y, factor, x);
  }
  absl::Status Pool(OpContext& context, PoolKind kind, int64_t kernel, int64_t length,
                    ScoreBuffer& x) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::Pool(*state, kind, kernel, length, x);
  }
  absl::Status DilateForward(OpContext& context, int64_t dilate, ScoreBuffer& x) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::DilateForward(*state, dilate, x);
  }
  absl::Status Fill(OpContext& context, int64_t begin, int64_t end, float value,
                    ScoreBuffer& x) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::Fill(*state, begin, end, value, x);
  }
  absl::StatusOr<Mass> MassAndEntropy(OpContext& context, const ScoreBuffer& x,
                                      int64_t row) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::MassAndEntropy(*state, x, row);
  }
  absl::StatusOr<std::vector<Mass>> MassAndEntropyOfEach(
      OpContext& context, absl::Span<const ScoreBuffer* const> buffers) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::MassAndEntropyOfEach(*state, buffers);
  }
  absl::StatusOr<std::vector<Selection>> Select(OpContext& context, const ScoreBuffer& scores,
                                                absl::Span<const SelectArgs> args) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::Select(*state, scores, args);
  }
  absl::StatusOr<std::vector<std::vector<Selection>>> SelectEach(
      OpContext& context, absl::Span<const SelectTask> tasks) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::SelectEach(*state, tasks);
  }
  absl::Status GatherRows(OpContext& context, const KvView& in,
                          absl::Span<const absl::Span<const int32_t>> keep_indices,
                          const MutableKvView& out) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::GatherRows(*state, in, keep_indices, out);
  }
  absl::Status GatherRowsOfEach(OpContext& context, absl::Span<const GatherTask> tasks) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::GatherRowsOfEach(*state, tasks);
  }
  absl::Status ReserveCompaction(OpContext& context, absl::Span<const CompactTask> tasks) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::ReserveCompaction(*state, tasks);
  }
  absl::Status CompactRows(OpContext& context,
                           absl::Span<const absl::Span<const int32_t>> keep_indices,
                           const MutableKvView& x) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return cuda::CompactRows(*state, keep_indices, x);
  }

  absl::Status CopyToHost(OpContext& context, const ScoreBuffer& x,
                          absl::Span<float> out) override {
    KEEPSET_RETURN_IF_ERROR(CheckCopySize(x, static_cast<int64_t>(out.size())));
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    KEEPSET_ASSIGN_OR_RETURN(const float* const from, cuda::Readable(*state, x));
    if (!state->is_queued()) std::fill(out.begin(), out.end(), 1.0f);
    KEEPSET_RETURN_IF_ERROR(state->Queue("cudaMemcpyAsync", [&] {
      return cudaMemcpyAsync(out.data(), from, out.size() * sizeof(float), cudaMemcpyDeviceToHost,
                             state->stream());
    }));
    return state->Wait();
  }
  absl::Status CopyFromHost(OpContext& context, absl::Span<const float> in,
                            ScoreBuffer& out) override {
    KEEPSET_RETURN_IF_ERROR(CheckCopySize(out, static_cast<int64_t>(in.size())));
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    float* const to = cuda::Cuda(out).Overwrite(*state);
    KEEPSET_RETURN_IF_ERROR(state->Queue("cudaMemcpyAsync", [&] {
      return cudaMemcpyAsync(to, in.data(), in.size() * sizeof(float), cudaMemcpyHostToDevice,
                             state->stream());
    }));
    // The caller's memory is read until then.
    return state->Queue("cudaStreamSynchronize",
                        [&] { return cudaStreamSynchronize(state->stream()); });
  }

  absl::Status Wait(OpContext& context) override {
    KEEPSET_ASSIGN_OR_RETURN(const Entered state, Enter(context));
    return state->Wait();
  }

 private:
  absl::Status FindHopperKernels() {
    if (traits_.architecture != "sm_90") {
      return absl::FailedPreconditionError(absl::StrCat("cuda: window_kernels=\"hopper\": device ",
                                                        traits_.ordinal, " is ",
                                                        traits_.architecture, ", want sm_90"));
    }
    absl::StatusOr<cuda::TensorMapEncoder> encoder = cuda::FindTensorMapEncoder();
    if (!encoder.ok()) {
      return absl::FailedPreconditionError(
          absl::StrCat("cuda: window_kernels=\"hopper\": ", encoder.status().message()));
    }
    traits_.tensor_maps = *encoder;
    return absl::OkStatus();
  }

  // Here, so that a server that lacks the library does not start.
  absl::Status LoadCublas(const std::string& path) {
    auto products = cuda::NewCublasProducts(cuda::CublasFile::Names(path), health_);
    if (!products.ok()) {
      return absl::Status(
          products.status().code(),
          absl::StrCat("cuda: window_kernels=\"cublas\": ", products.status().message()));
    }
    products_ = *std::move(products);
    traits_.products = products_.get();
    return absl::OkStatus();
  }

  absl::Status ReadDevice() {
    cudaDeviceProp properties = {};
    int driver_version = 0;
    KEEPSET_RETURN_IF_CUDA_ERROR(health_, cudaGetDeviceProperties(&properties, traits_.ordinal));
    KEEPSET_RETURN_IF_CUDA_ERROR(health_, cudaDriverGetVersion(&driver_version));
    const std::string hex =
        absl::BytesToHexString(absl::string_view(properties.uuid.bytes, sizeof(properties.uuid)));
    device_.uuid = absl::StrCat("GPU-", hex.substr(0, 8), "-", hex.substr(8, 4), "-",
                                hex.substr(12, 4), "-", hex.substr(16, 4), "-", hex.substr(20));
    device_.name = properties.name;
    device_.driver_version = VersionText(driver_version);
    device_.compute_capability = absl::StrCat(properties.major, ".", properties.minor);
    device_.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    return NoteWhatIsSpecial(driver_version);
  }

  // What changes how the device behaves although everything works.
  absl::Status NoteWhatIsSpecial(int driver_version) {
    int runtime_version = 0;
    KEEPSET_RETURN_IF_CUDA_ERROR(health_, cudaRuntimeGetVersion(&runtime_version));
    std::vector<std::string> notes;
    if (driver_version < runtime_version) {
      notes.push_back(absl::StrCat("the driver supports CUDA ", VersionText(driver_version),
                                   ", keepsetd was built with ", VersionText(runtime_version),
                                   ": update the driver"));
    }
    // The driver names instances "NVIDIA H100 80GB HBM3 MIG 1g.10gb".
    if (absl::StrContains(device_.name, " MIG ")) {
      notes.push_back("a MIG instance: memory is not shared with other GPU instances");
    }
    // Older drivers do not know the attribute.
    int has_mps = 0;
    if (cudaDeviceGetAttribute(&has_mps, cudaDevAttrMpsEnabled, traits_.ordinal) != cudaSuccess) {
      cudaGetLastError();
    } else if (has_mps != 0) {
      notes.push_back("used through MPS: a fatal fault of one process ends all of them");
    }
    device_.note = absl::StrJoin(notes, "; ");
    return absl::OkStatus();
  }

  absl::Status ReadAttribute(cudaDeviceAttr attribute, int* value) {
    return health_.Check(cudaDeviceGetAttribute(value, attribute, traits_.ordinal),
                         "cudaDeviceGetAttribute");
  }

  // Contexts come from this backend (contract of the interface). A faulted device answers nothing
  // any more.
  absl::StatusOr<Entered> Enter(OpContext& context) {
    KEEPSET_RETURN_IF_ERROR(health_.status());
    KEEPSET_ASSIGN_OR_RETURN(cuda::CurrentDevice device,
                             cuda::CurrentDevice::Set(traits_.ordinal, health_));
    cuda::StreamState& state = static_cast<cuda::CudaContext&>(context).state();
    KEEPSET_RETURN_IF_ERROR(cuda::CheckNotInCapture(state.callers_stream(), health_));
    KEEPSET_RETURN_IF_ERROR(state.Prepare());
    return Entered(std::move(device), &state);
  }

  DeviceInfo device_;
  cuda::DeviceTraits traits_;
  cuda::DeviceHealth health_;
  cuda::DevicePool pool_;
  std::unique_ptr<cuda::LogitProducts> products_;  // outlives the streams
  cuda::StreamPool streams_;
};

absl::StatusOr<cuda::WindowKernels> ParseWindowKernels(absl::string_view name) {
  if (name.empty() || name == "portable") return cuda::WindowKernels::kPortable;
  if (name == "hopper") return cuda::WindowKernels::kHopper;
  if (name == "cublas") {
    KEEPSET_RETURN_IF_ERROR(cuda::CheckCublasIsBuilt());
    return cuda::WindowKernels::kCublas;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "cuda: window_kernels=\"", name, "\", want \"portable\", \"hopper\" or \"cublas\""));
}

}  // namespace

// Declared by backend_registry.cc through backends.def.
absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCudaBackend(const BackendOptions& options) {
  // A name that is wrong on every host is said so on one without a device, too.
  KEEPSET_ASSIGN_OR_RETURN(const cuda::WindowKernels window_kernels,
                           ParseWindowKernels(options.window_kernels));
  const bool has_products = window_kernels == cuda::WindowKernels::kCublas;
  KEEPSET_RETURN_IF_ERROR(
      cuda::CheckDeviceMemory(options, has_products ? cuda::kCublasWorkspaceBytes : 0));
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess || num_devices == 0) {
    return absl::FailedPreconditionError(absl::StrCat("cuda: no device: ", WhyNoDevice(error)));
  }
  auto backend = std::make_unique<CudaBackend>();
  KEEPSET_RETURN_IF_ERROR(backend->Init(window_kernels, options.cublas_library));
  KEEPSET_RETURN_IF_ERROR(backend->ReserveMemory(options));
  return backend;
}

}  // namespace keepset::kernels
