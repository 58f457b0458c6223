#include "tests/kernels/kernel_test_support.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "kernels/backend_registry.h"
#include "tests/fakes/test_seed.h"

namespace keepset::kernels {

// Of kernels/cpu, by its own name: tests of another backend link no registry.
absl::StatusOr<std::unique_ptr<ComputeBackend>> NewCpuBackend(const BackendOptions& options);

namespace {

uint16_t ToBfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t ToHalf(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 65520.0) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // The last place is 2^(exponent - 11), at least 2^-24.
  const int place = std::max(exponent - 11, -24);
  const double steps = std::nearbyint(std::ldexp(magnitude, -place));
  if (place == -24) return sign | static_cast<uint16_t>(steps);
  return sign | static_cast<uint16_t>(((place + 24) << 10) + static_cast<int>(steps));
}

float FromHalf(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  float value = 0.0f;
  if (exponent == 31) {
    value = mantissa != 0 ? std::numeric_limits<float>::quiet_NaN()
                          : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    value = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return (half & 0x8000) != 0 ? -value : value;
}

void Store(std::byte* data, int64_t index, DType dtype, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(data + index * 4, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::kBF16 ? ToBfloat(value) : ToHalf(value);
  std::memcpy(data + index * 2, &bits, 2);
}

float Load(const std::byte* data, int64_t index, DType dtype) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, data + index * 4, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data + index * 2, 2);
  if (dtype == DType::kF16) return FromHalf(bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace

float Rounded(float value, DType dtype) {
  std::byte memory[4];
  Store(memory, 0, dtype, value);
  return Load(memory, 0, dtype);
}

std::vector<float> RandomValues(std::mt19937& rng, int64_t count, DType dtype, float sigma) {
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(count);
  for (float& value : values) value = Rounded(normal(rng), dtype);
  return values;
}

KvTensor::KvTensor(const std::vector<float>& values, int64_t num_kv_heads, int64_t seq_len,
                   int64_t head_dim, DType dtype, Layout layout, int64_t block_size, int64_t gap) {
  shape_.dtype = dtype;
  shape_.num_kv_heads = num_kv_heads;
  shape_.seq_len = seq_len;
  shape_.head_dim = head_dim;
  int64_t elements = 0;
  switch (layout) {
    case Layout::kNhd:
      shape_.head_stride = head_dim;
      shape_.token_stride = num_kv_heads * head_dim + gap;
      elements = seq_len * shape_.token_stride;
      break;
    case Layout::kHnd:
      shape_.token_stride = head_dim + gap;
      shape_.head_stride = seq_len * shape_.token_stride;
      elements = num_kv_heads * shape_.head_stride;
      break;
    case Layout::kPaged: {
      shape_.block_size = block_size;
      shape_.head_stride = head_dim;
      shape_.token_stride = num_kv_heads * head_dim;
      shape_.block_stride = block_size * shape_.token_stride + gap;
      const int64_t num_blocks = (seq_len + block_size - 1) / block_size;
      // More blocks than used, in a shuffled order.
      std::vector<int32_t> ids(num_blocks + 2);
      std::iota(ids.begin(), ids.end(), 0);
      std::mt19937 rng(fakes::TestSeed(7));
      std::shuffle(ids.begin(), ids.end(), rng);
      block_table_.assign(ids.begin(), ids.begin() + num_blocks);
      elements = (num_blocks + 2) * shape_.block_stride;
      break;
    }
  }
  bytes_.resize(elements * DTypeBytes(dtype));
  for (int64_t i = 0; i < elements; ++i) {
    Store(bytes_.data(), i, dtype, std::numeric_limits<float>::quiet_NaN());
  }
  for (int64_t g = 0; g < num_kv_heads; ++g) {
    for (int64_t t = 0; t < seq_len; ++t) {
      for (int64_t c = 0; c < head_dim; ++c) {
        Set(g, t, c, values[(g * seq_len + t) * head_dim + c]);
      }
    }
  }
}

int64_t KvTensor::Index(int64_t head, int64_t token, int64_t channel) const {
  int64_t index = head * shape_.head_stride + channel;
  if (shape_.block_size == 0) return index + token * shape_.token_stride;
  index += block_table_[token / shape_.block_size] * shape_.block_stride;
  return index + token % shape_.block_size * shape_.token_stride;
}

KvView KvTensor::view() const {
  KvView view = shape_;
  view.data = bytes_.data();
  view.size_bytes = static_cast<int64_t>(bytes_.size());
  view.block_table = block_table_;
  return view;
}

MutableKvView KvTensor::mutable_view() {
  MutableKvView view;
  view.data = bytes_.data();
  view.size_bytes = static_cast<int64_t>(bytes_.size());
  view.dtype = shape_.dtype;
  view.num_kv_heads = shape_.num_kv_heads;
  view.seq_len = shape_.seq_len;
  view.head_dim = shape_.head_dim;
  view.head_stride = shape_.head_stride;
  view.token_stride = shape_.token_stride;
  view.block_size = shape_.block_size;
  view.block_stride = shape_.block_stride;
  view.block_table = block_table_;
  return view;
}

float KvTensor::At(int64_t head, int64_t token, int64_t channel) const {
  return Load(bytes_.data(), Index(head, token, channel), shape_.dtype);
}

void KvTensor::Set(int64_t head, int64_t token, int64_t channel, float value) {
  Store(bytes_.data(), Index(head, token, channel), shape_.dtype, value);
}

DenseTensor::DenseTensor(const std::vector<float>& values, int64_t heads, int64_t rows,
                         int64_t cols, DType dtype)
    : bytes_(heads * rows * cols * DTypeBytes(dtype)),
      dtype_(dtype),
      heads_(heads),
      rows_(rows),
      cols_(cols) {
  KEEPSET_CHECK(static_cast<int64_t>(values.size()) == heads * rows * cols);
  for (size_t i = 0; i < values.size(); ++i) Store(bytes_.data(), i, dtype, values[i]);
}

QueryView DenseTensor::queries() const {
  QueryView view;
  view.data = bytes_.data();
  view.size_bytes = static_cast<int64_t>(bytes_.size());
  view.dtype = dtype_;
  view.num_qo_heads = heads_;
  view.num_rows = rows_;
  view.head_dim = cols_;
  view.head_stride = rows_ * cols_;
  view.row_stride = cols_;
  return view;
}

TileView DenseTensor::tile() const {
  TileView view;
  view.data = bytes_.data();
  view.size_bytes = static_cast<int64_t>(bytes_.size());
  view.dtype = dtype_;
  view.num_qo_heads = heads_;
  view.num_rows = rows_;
  view.seq_len = cols_;
  view.head_stride = rows_ * cols_;
  view.row_stride = cols_;
  return view;
}

LseView DenseTensor::lse() const {
  LseView view;
  view.data = bytes_.data();
  view.size_bytes = static_cast<int64_t>(bytes_.size());
  view.dtype = dtype_;
  view.num_qo_heads = heads_;
  view.num_rows = rows_;
  view.head_stride = rows_;
  return view;
}

float DenseTensor::At(int64_t head, int64_t row, int64_t col) const {
  return Load(bytes_.data(), (head * rows_ + row) * cols_ + col, dtype_);
}

void DenseTensor::Set(int64_t head, int64_t row, int64_t col, float value) {
  Store(bytes_.data(), (head * rows_ + row) * cols_ + col, dtype_, value);
}

std::vector<int64_t> LastPositions(int64_t num_rows, int64_t seq_len) {
  std::vector<int64_t> positions(num_rows);
  std::iota(positions.begin(), positions.end(), seq_len - num_rows);
  return positions;
}

Attention AttentionOracle(const DenseTensor& q, const KvTensor& k,
                          const std::vector<int64_t>& row_positions, double scale) {
  const QueryView shape = q.queries();
  const KvView keys = k.view();
  const int64_t group = shape.num_qo_heads / keys.num_kv_heads;
  Attention attention;
  attention.tile.assign(shape.num_qo_heads * shape.num_rows * keys.seq_len, 0.0);
  for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
    for (int64_t i = 0; i < shape.num_rows; ++i) {
      double* row = &attention.tile[(h * shape.num_rows + i) * keys.seq_len];
      double max = -std::numeric_limits<double>::infinity();
      for (int64_t t = 0; t <= row_positions[i]; ++t) {
        double dot = 0.0;
        for (int64_t c = 0; c < keys.head_dim; ++c) {
          dot += static_cast<double>(q.At(h, i, c)) * k.At(h / group, t, c);
        }
        row[t] = dot * scale;
        max = std::max(max, row[t]);
      }
      double sum = 0.0;
      for (int64_t t = 0; t <= row_positions[i]; ++t) sum += std::exp(row[t] - max);
      const double lse = max + std::log(sum);
      for (int64_t t = 0; t <= row_positions[i]; ++t) row[t] = std::exp(row[t] - lse);
      attention.lse.push_back(lse);
    }
  }
  return attention;
}

std::vector<double> ReduceOracle(const std::vector<double>& tile, int64_t num_heads,
                                 int64_t num_rows, int64_t seq_len, RowReduction reduction) {
  std::vector<double> out(num_heads * seq_len, 0.0);
  for (int64_t h = 0; h < num_heads; ++h) {
    for (int64_t t = 0; t < seq_len; ++t) {
      double& to = out[h * seq_len + t];
      for (int64_t i = 0; i < num_rows; ++i) {
        const double p = tile[(h * num_rows + i) * seq_len + t];
        switch (reduction) {
          case RowReduction::kMean:
            to += p / static_cast<double>(num_rows);
            break;
          case RowReduction::kSum:
            to += p;
            break;
          case RowReduction::kMax:
            to = std::max(to, p);
            break;
          case RowReduction::kLast:
            to = p;
            break;
        }
      }
    }
  }
  return out;
}

std::unique_ptr<ComputeBackend> CpuBackend(int num_threads) {
  BackendOptions options;
  options.num_threads = num_threads;
  absl::StatusOr<std::unique_ptr<ComputeBackend>> backend = NewCpuBackend(options);
  KEEPSET_CHECK(backend.ok());
  return *std::move(backend);
}

BackendFixture::BackendFixture(int num_threads)
    : threads_(tbb::global_control::max_allowed_parallelism, 8), backend_(CpuBackend(num_threads)) {
  absl::StatusOr<std::unique_ptr<OpContext>> context = backend_->NewContext();
  KEEPSET_CHECK(context.ok());
  context_ = *std::move(context);
}

std::unique_ptr<ScoreBuffer> BackendFixture::Buffer(int64_t rows, int64_t cols) {
  absl::StatusOr<std::unique_ptr<ScoreBuffer>> buffer = backend_->NewBuffer(rows, cols);
  KEEPSET_CHECK(buffer.ok());
  return *std::move(buffer);
}

std::unique_ptr<ScoreBuffer> BackendFixture::Buffer(int64_t rows, int64_t cols,
                                                    const std::vector<float>& values) {
  std::unique_ptr<ScoreBuffer> buffer = Buffer(rows, cols);
  KEEPSET_CHECK(backend_->CopyFromHost(*context_, values, *buffer).ok());
  return buffer;
}

std::vector<float> BackendFixture::Values(const ScoreBuffer& buffer) {
  std::vector<float> values(buffer.rows() * buffer.cols());
  KEEPSET_CHECK(backend_->CopyToHost(*context_, buffer, absl::MakeSpan(values)).ok());
  return values;
}

}  // namespace keepset::kernels
