// A compute backend whose window scores wait at a gate, so that a test can look at an operation in
// the middle. Everything else is passed through.
#ifndef KEEPSET_TESTS_FAKES_GATED_BACKEND_H_
#define KEEPSET_TESTS_FAKES_GATED_BACKEND_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "kernels/compute_backend.h"

namespace keepset::fakes {

// Shared by the test and the backend. Open at first. Thread-safe.
class Gate {
 public:
  void Close() {
    absl::MutexLock lock(&mutex_);
    open_ = false;
  }
  void Open() {
    absl::MutexLock lock(&mutex_);
    open_ = true;
  }
  // Lets `status` be the answer of every pass from now on.
  void FailWith(absl::Status status) {
    absl::MutexLock lock(&mutex_);
    failure_ = std::move(status);
  }
  // The device fails: `status` is the answer of every pass and the backend's health.
  void BreakDevice(absl::Status status) {
    absl::MutexLock lock(&mutex_);
    failure_ = status;
    health_ = std::move(status);
  }
  absl::Status health() const {
    absl::MutexLock lock(&mutex_);
    return health_;
  }
  // Compaction `number` of a tensor, counted from 0, fails with `status`.
  void FailCompaction(int number, absl::Status status) {
    AnswerCompaction(number, [status = std::move(status)] { return status; });
  }
  // It ends as `answer` does, which may throw.
  void AnswerCompaction(int number, std::function<absl::Status()> answer) {
    absl::MutexLock lock(&mutex_);
    compactions_left_ = number;
    compaction_answer_ = std::move(answer);
  }
  absl::Status Compact() {
    absl::MutexLock lock(&mutex_);
    return compactions_left_-- == 0 ? compaction_answer_() : absl::OkStatus();
  }
  // The same of gathers to other memory.
  void AnswerGather(int number, std::function<absl::Status()> answer) {
    absl::MutexLock lock(&mutex_);
    gathers_left_ = number;
    gather_answer_ = std::move(answer);
  }
  absl::Status Gather() {
    absl::MutexLock lock(&mutex_);
    return gathers_left_-- == 0 ? gather_answer_() : absl::OkStatus();
  }
  // Reservations for compactions fail with `status` from now on.
  void FailReservations(absl::Status status) {
    absl::MutexLock lock(&mutex_);
    reservation_failure_ = std::move(status);
  }
  absl::Status Reserve() const {
    absl::MutexLock lock(&mutex_);
    return reservation_failure_;
  }
  // Every pass throws `what`() from now on, as a library might.
  void Throw(std::function<void()> what) {
    absl::MutexLock lock(&mutex_);
    throw_ = std::move(what);
  }
  // How many layers came in each call for window columns, in order.
  void NoteLayers(size_t count) {
    absl::MutexLock lock(&mutex_);
    layers_.push_back(count);
  }
  std::vector<size_t> layers() const {
    absl::MutexLock lock(&mutex_);
    return layers_;
  }
  absl::Status Pass() {
    absl::MutexLock lock(&mutex_);
    ++waiting_;
    mutex_.Await(absl::Condition(&open_));
    --waiting_;
    if (throw_) throw_();
    return failure_;
  }
  // True when `count` operations stand at the gate before the deadline.
  bool AwaitWaiting(int count) {
    absl::MutexLock lock(&mutex_);
    wanted_ = count;
    return mutex_.AwaitWithTimeout(absl::Condition(this, &Gate::Enough), absl::Seconds(30));
  }

 private:
  bool Enough() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return waiting_ >= wanted_; }

  mutable absl::Mutex mutex_;
  bool open_ ABSL_GUARDED_BY(mutex_) = true;
  int waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  int wanted_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  absl::Status health_ ABSL_GUARDED_BY(mutex_);
  std::function<void()> throw_ ABSL_GUARDED_BY(mutex_);
  int compactions_left_ ABSL_GUARDED_BY(mutex_) = -1;
  absl::Status reservation_failure_ ABSL_GUARDED_BY(mutex_);
  std::function<absl::Status()> compaction_answer_ ABSL_GUARDED_BY(mutex_);
  int gathers_left_ ABSL_GUARDED_BY(mutex_) = -1;
  std::function<absl::Status()> gather_answer_ ABSL_GUARDED_BY(mutex_);
  std::vector<size_t> layers_ ABSL_GUARDED_BY(mutex_);
};

class GatedBackend : public kernels::ComputeBackend {
 public:
  GatedBackend(std::unique_ptr<kernels::ComputeBackend> inner, Gate& gate,
               int64_t layers_at_once = 1)
      : inner_(std::move(inner)), gate_(gate), layers_at_once_(layers_at_once) {}

  std::string name() const override { return inner_->name(); }
  std::string NameFor(const kernels::OpContext& context) const override {
    return inner_->NameFor(context);
  }
  kernels::DeviceInfo Device() const override { return inner_->Device(); }
  absl::Status Health() const override { return gate_.health(); }
  kernels::DeviceMemoryUse MemoryUse() const override { return inner_->MemoryUse(); }
  using ComputeBackend::NewContext;
  absl::StatusOr<std::unique_ptr<kernels::OpContext>> NewContext(
      const kernels::ContextOptions& options) override {
    return inner_->NewContext(options);
  }
  int64_t layers_at_once() const override { return layers_at_once_; }
  absl::StatusOr<std::unique_ptr<kernels::ScoreBuffer>> NewBuffer(int64_t rows,
                                                                  int64_t cols) override {
    return inner_->NewBuffer(rows, cols);
  }
  absl::Status WindowColumns(kernels::OpContext& context, const kernels::WindowArgs& args,
                             kernels::ScoreBuffer& out) override {
    if (absl::Status status = gate_.Pass(); !status.ok()) return status;
    return inner_->WindowColumns(context, args, out);
  }
  absl::Status WindowColumnsOfLayers(kernels::OpContext& context,
                                     absl::Span<const kernels::WindowArgs> layers,
                                     absl::Span<kernels::ScoreBuffer* const> outs) override {
    gate_.NoteLayers(layers.size());
    return ComputeBackend::WindowColumnsOfLayers(context, layers, outs);
  }
  absl::Status TileColumns(kernels::OpContext& context, const kernels::TileArgs& args,
                           kernels::ScoreBuffer& out) override {
    return inner_->TileColumns(context, args, out);
  }
  absl::Status RowNorms(kernels::OpContext& context, const kernels::KvView& x,
                        absl::string_view what, kernels::ScoreBuffer& out) override {
    return inner_->RowNorms(context, x, what, out);
  }
  absl::Status KeyNovelty(kernels::OpContext& context, const kernels::KvView& k,
                          absl::Span<const int64_t> kv_heads, absl::string_view what,
                          kernels::ScoreBuffer& out) override {
    return inner_->KeyNovelty(context, k, kv_heads, what, out);
  }
  absl::Status NormalizeRows(kernels::OpContext& context, kernels::Normalization normalization,
                             absl::Span<const kernels::SelectArgs::Range> excluded,
                             kernels::ScoreBuffer& x) override {
    return inner_->NormalizeRows(context, normalization, excluded, x);
  }
  absl::Status DivideByRowMean(kernels::OpContext& context, float eps,
                               kernels::ScoreBuffer& x) override {
    return inner_->DivideByRowMean(context, eps, x);
  }
  absl::Status MergeRows(kernels::OpContext& context, const kernels::ScoreBuffer& in,
                         kernels::Merge merge, absl::Span<const float> weights,
                         kernels::ScoreBuffer& out) override {
    return inner_->MergeRows(context, in, merge, weights, out);
  }
  absl::Status Accumulate(kernels::OpContext& context, const kernels::ScoreBuffer& x,
                          kernels::Merge merge, float weight, kernels::ScoreBuffer& acc) override {
    return inner_->Accumulate(context, x, merge, weight, acc);
  }
  absl::Status Multiply(kernels::OpContext& context, const kernels::ScoreBuffer& y, float factor,
                        kernels::ScoreBuffer& x) override {
    return inner_->Multiply(context, y, factor, x);
  }
  absl::Status Pool(kernels::OpContext& context, kernels::PoolKind kind, int64_t kernel,
                    int64_t length, kernels::ScoreBuffer& x) override {
    return inner_->Pool(context, kind, kernel, length, x);
  }
  absl::Status DilateForward(kernels::OpContext& context, int64_t dilate,
                             kernels::ScoreBuffer& x) override {
    return inner_->DilateForward(context, dilate, x);
  }
  absl::Status Fill(kernels::OpContext& context, int64_t begin, int64_t end, float value,
                    kernels::ScoreBuffer& x) override {
    return inner_->Fill(context, begin, end, value, x);
  }
  absl::StatusOr<Mass> MassAndEntropy(kernels::OpContext& context, const kernels::ScoreBuffer& x,
                                      int64_t row) override {
    return inner_->MassAndEntropy(context, x, row);
  }
  absl::StatusOr<std::vector<kernels::Selection>> Select(
      kernels::OpContext& context, const kernels::ScoreBuffer& scores,
      absl::Span<const kernels::SelectArgs> args) override {
    return inner_->Select(context, scores, args);
  }
  absl::Status GatherRows(kernels::OpContext& context, const kernels::KvView& in,
                          absl::Span<const absl::Span<const int32_t>> keep_indices,
                          const kernels::MutableKvView& out) override {
    if (absl::Status status = gate_.Gather(); !status.ok()) return status;
    return inner_->GatherRows(context, in, keep_indices, out);
  }
  absl::Status ReserveCompaction(kernels::OpContext& context,
                                 absl::Span<const kernels::CompactTask> tasks) override {
    if (absl::Status status = gate_.Reserve(); !status.ok()) return status;
    return inner_->ReserveCompaction(context, tasks);
  }
  absl::Status CompactRows(kernels::OpContext& context,
                           absl::Span<const absl::Span<const int32_t>> keep_indices,
                           const kernels::MutableKvView& x) override {
    if (absl::Status status = gate_.Compact(); !status.ok()) return status;
    return inner_->CompactRows(context, keep_indices, x);
  }
  absl::Status CopyToHost(kernels::OpContext& context, const kernels::ScoreBuffer& x,
                          absl::Span<float> out) override {
    return inner_->CopyToHost(context, x, out);
  }
  absl::Status CopyFromHost(kernels::OpContext& context, absl::Span<const float> in,
                            kernels::ScoreBuffer& out) override {
    return inner_->CopyFromHost(context, in, out);
  }
  absl::Status Wait(kernels::OpContext& context) override { return inner_->Wait(context); }

 private:
  const std::unique_ptr<kernels::ComputeBackend> inner_;
  Gate& gate_;
  const int64_t layers_at_once_;
};

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_GATED_BACKEND_H_
