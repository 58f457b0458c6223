#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "kernels/cpu/cpu_context.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd_target.h"
#include "kernels/op_checks.h"

namespace keepset::kernels {
namespace {

// Contexts and buffers come from this backend (contract of the interface).
cpu::CpuContext& Cpu(OpContext& context) { return static_cast<cpu::CpuContext&>(context); }

class CpuBackend : public ComputeBackend {
 public:
  explicit CpuBackend(int num_threads) : arena_(cpu::NewThreadArena(num_threads)) {}

  std::string name() const override { return absl::StrCat("cpu/", cpu::SimdTargetName()); }

  absl::StatusOr<std::unique_ptr<OpContext>> NewContext(const ContextOptions& options) override {
    if (options.stream != nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("stream: backend ", name(), " has none, want backend cuda or no stream"));
    }
    return std::make_unique<cpu::CpuContext>(arena_.get());
  }
  absl::StatusOr<std::unique_ptr<ScoreBuffer>> NewBuffer(int64_t rows, int64_t cols) override {
    return cpu::CpuScoreBuffer::New(rows, cols);
  }

  absl::Status WindowColumns(OpContext& context, const WindowArgs& args,
                             ScoreBuffer& out) override {
    return cpu::WindowColumns(Cpu(context), args, out);
  }
  absl::Status TileColumns(OpContext& context, const TileArgs& args, ScoreBuffer& out) override {
    return cpu::TileColumns(Cpu(context), args, out);
  }
  absl::Status RowNorms(OpContext& context, const KvView& x, absl::string_view what,
                        ScoreBuffer& out) override {
    return cpu::RowNorms(Cpu(context), x, what, out);
  }
  absl::Status KeyNovelty(OpContext& context, const KvView& k, absl::Span<const int64_t> kv_heads,
                          absl::string_view what, ScoreBuffer& out) override {
    return cpu::KeyNovelty(Cpu(context), k, kv_heads, what, out);
  }
  absl::Status NormalizeRows(OpContext& context, Normalization normalization,
                             absl::Span<const SelectArgs::Range> excluded,
                             ScoreBuffer& x) override {
    return cpu::NormalizeRows(Cpu(context), normalization, excluded, x);
  }
  absl::Status DivideByRowMean(OpContext& context, float eps, ScoreBuffer& x) override {
    return cpu::DivideByRowMean(Cpu(context), eps, x);
  }
  absl::Status MergeRows(OpContext& context, const ScoreBuffer& in, Merge merge,
                         absl::Span<const float> weights, ScoreBuffer& out) override {
    return cpu::MergeRows(Cpu(context), in, merge, weights, out);
  }
  absl::Status Accumulate(OpContext& context, const ScoreBuffer& x, Merge merge, float weight,
                          ScoreBuffer& acc) override {
    return cpu::Accumulate(Cpu(context), x, merge, weight, acc);
  }
  absl::Status Multiply(OpContext& context, const ScoreBuffer& y, float factor,
                        ScoreBuffer& x) override {
    return cpu::Multiply(Cpu(context), y, factor, x);
  }
  absl::Status Pool(OpContext& context, PoolKind kind, int64_t kernel, int64_t length,
                    ScoreBuffer& x) override {
    return cpu::Pool(Cpu(context), kind, kernel, length, x);
  }
  absl::Status DilateForward(OpContext& context, int64_t dilate, ScoreBuffer& x) override {
    return cpu::DilateForward(Cpu(context), dilate, x);
  }
  absl::Status Fill(OpContext& context, int64_t begin, int64_t end, float value,
                    ScoreBuffer& x) override {
    return cpu::Fill(Cpu(context), begin, end, value, x);
  }
  absl::StatusOr<Mass> MassAndEntropy(OpContext& context, const ScoreBuffer& x,
                                      int64_t row) override {
    return cpu::MassAndEntropy(Cpu(context), x, row);
  }
  absl::StatusOr<std::vector<Selection>> Select(OpContext& context, const ScoreBuffer& scores,
                                                absl::Span<const SelectArgs> args) override {
    return cpu::Select(Cpu(context), scores, args);
  }
  absl::Status GatherRows(OpContext& context, const KvView& in,
                          absl::Span<const absl::Span<const int32_t>> keep_indices,
                          const MutableKvView& out) override {
    return cpu::GatherRows(Cpu(context), in, keep_indices, out);
  }
  // Rows move in place, through no other memory.
  absl::Status ReserveCompaction(OpContext& /*context*/,
                                 absl::Span<const CompactTask> tasks) override {
    for (const CompactTask& task : tasks) {
      KEEPSET_RETURN_IF_ERROR(CheckCompact(task.keep_indices, task.x));
    }
    return absl::OkStatus();
  }
  absl::Status CompactRows(OpContext& context,
                           absl::Span<const absl::Span<const int32_t>> keep_indices,
                           const MutableKvView& x) override {
    return cpu::CompactRows(Cpu(context), keep_indices, x);
  }

  absl::Status CopyToHost(OpContext& /*context*/, const ScoreBuffer& x,
                          absl::Span<float> out) override {
    if (absl::Status status = CheckCopySize(x, static_cast<int64_t>(out.size())); !status.ok())
      return status;
    std::memcpy(out.data(), x.data(), out.size() * sizeof(float));
    return absl::OkStatus();
  }
  absl::Status CopyFromHost(OpContext& /*context*/, absl::Span<const float> in,
                            ScoreBuffer& out) override {
    if (absl::Status status = CheckCopySize(out, static_cast<int64_t>(in.size())); !status.ok())
      return status;
    std::memcpy(out.data(), in.data(), in.size() * sizeof(float));
    return absl::OkStatus();
  }

  absl::Status Wait(OpContext& /*context*/) override { return absl::OkStatus(); }

 private:
  const std::unique_ptr<cpu::ThreadArena> arena_;
};

}  // namespace

// Declared by backend_registry.cc through backends.def.
absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCpuBackend(const BackendOptions& options) {
  constexpr int kMostThreads = 1024;
  if (options.num_threads < 0 || options.num_threads > kMostThreads) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_threads=", options.num_threads, ", want 0 (all cores) ..", kMostThreads));
  }
  if (!options.window_kernels.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("window_kernels=\"", options.window_kernels,
                                                   "\", want none with backend cpu"));
  }
  if (options.device_memory_bytes != 0 || options.device_memory != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "device_memory_bytes=", options.device_memory_bytes, ", want none with backend cpu"));
  }
  return std::make_unique<CpuBackend>(options.num_threads == 0 ? cpu::NumUsableCores()
                                                               : options.num_threads);
}

}  // namespace keepset::kernels
