// Tensors in every layout and type that the backends read, and plain fp64 loops to compare with.
#ifndef KEEPSET_TESTS_KERNELS_KERNEL_TEST_SUPPORT_H_
#define KEEPSET_TESTS_KERNELS_KERNEL_TEST_SUPPORT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "kernels/compute_backend.h"
#include "kernels/views.h"
#include "tbb/global_control.h"

namespace keepset::kernels {

// Rounds to `dtype` and back: the value that a tensor of that type holds.
float Rounded(float value, DType dtype);

// Normally distributed values that `dtype` represents exactly.
std::vector<float> RandomValues(std::mt19937& rng, int64_t count, DType dtype, float sigma = 1.0f);

enum class Layout { kNhd, kHnd, kPaged };

// Owns a [num_kv_heads, seq_len, head_dim] tensor. Everything that is not part of it holds NaN.
class KvTensor {
 public:
  // values: [num_kv_heads, seq_len, head_dim]. `gap`: elements of padding between rows or blocks,
  // so that strides are not the dense ones.
  KvTensor(const std::vector<float>& values, int64_t num_kv_heads, int64_t seq_len,
           int64_t head_dim, DType dtype, Layout layout, int64_t block_size = 16, int64_t gap = 3);

  KvView view() const;
  MutableKvView mutable_view();
  float At(int64_t head, int64_t token, int64_t channel) const;
  void Set(int64_t head, int64_t token, int64_t channel, float value);
  // Every byte of the memory, padding included.
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  int64_t Index(int64_t head, int64_t token, int64_t channel) const;

  std::vector<std::byte> bytes_;
  std::vector<int32_t> block_table_;
  KvView shape_;
};

// Owns a dense [heads, rows, cols] tensor; serves as queries, tile or log-sum-exp.
class DenseTensor {
 public:
  DenseTensor(const std::vector<float>& values, int64_t heads, int64_t rows, int64_t cols,
              DType dtype);

  QueryView queries() const;
  TileView tile() const;
  LseView lse() const;  // cols is 1
  float At(int64_t head, int64_t row, int64_t col) const;
  void Set(int64_t head, int64_t row, int64_t col, float value);

 private:
  std::vector<std::byte> bytes_;
  DType dtype_;
  int64_t heads_;
  int64_t rows_;
  int64_t cols_;
};

// The last `num_rows` positions of the prompt.
std::vector<int64_t> LastPositions(int64_t num_rows, int64_t seq_len);

// [num_qo_heads, num_rows, seq_len] masked softmax, and its natural log-sum-exp [num_qo_heads,
// num_rows].
struct Attention {
  std::vector<double> tile;
  std::vector<double> lse;
};
Attention AttentionOracle(const DenseTensor& q, const KvTensor& k,
                          const std::vector<int64_t>& row_positions, double scale);

// [num_heads, seq_len] from a tile.
std::vector<double> ReduceOracle(const std::vector<double>& tile, int64_t num_heads,
                                 int64_t num_rows, int64_t seq_len, RowReduction reduction);

std::unique_ptr<ComputeBackend> CpuBackend(int num_threads = 2);

// A backend with one context, and buffers in and out as vectors.
class BackendFixture {
 public:
  explicit BackendFixture(int num_threads = 2);

  ComputeBackend& backend() { return *backend_; }
  OpContext& context() { return *context_; }
  std::unique_ptr<ScoreBuffer> Buffer(int64_t rows, int64_t cols);
  std::unique_ptr<ScoreBuffer> Buffer(int64_t rows, int64_t cols, const std::vector<float>& values);
  std::vector<float> Values(const ScoreBuffer& buffer);

 private:
  // Lets a backend have more threads than the machine has cores.
  tbb::global_control threads_;
  std::unique_ptr<ComputeBackend> backend_;
  std::unique_ptr<OpContext> context_;
};

}  // namespace keepset::kernels

#endif  // KEEPSET_TESTS_KERNELS_KERNEL_TEST_SUPPORT_H_
