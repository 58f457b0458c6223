// The products of window scores by cuBLAS.
#ifndef KEEPSET_KERNELS_CUDA_CUBLAS_PRODUCTS_H_
#define KEEPSET_KERNELS_CUDA_CUBLAS_PRODUCTS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/views.h"

namespace keepset::kernels::cuda {

// logits[b, r, t] = sum over c of queries[b, r, c] * keys[b, t, c], in fp32, for b in [0, batch).
// Pitches are between rows, strides between the matrices of a batch, both in elements. Keys and
// queries have one type. num_tokens, num_rows, head_dim and the pitches fit 31 bits.
struct LogitGemm {
  DType dtype = DType::kF32;
  const std::byte* keys = nullptr;
  int64_t key_pitch = 0;
  int64_t key_stride = 0;
  const std::byte* queries = nullptr;
  int64_t query_pitch = 0;
  int64_t query_stride = 0;
  float* logits = nullptr;
  int64_t logit_pitch = 0;
  int64_t logit_stride = 0;
  int64_t num_tokens = 0;
  int64_t num_rows = 0;
  int64_t head_dim = 0;
  int64_t batch = 0;
};

// Device memory that products of one stream work in, aligned to 256 bytes.
constexpr int64_t kCublasWorkspaceBytes = int64_t{4} << 20;

// Products on one device. Thread-safe.
class LogitProducts {
 public:
  virtual ~LogitProducts() = default;

  // Queues the products on `stream`, neither waiting nor allocating. workspace:
  // kCublasWorkspaceBytes that no other stream uses. The same arguments give the same bits on one
  // device with one version of the library. InvalidArgument for a shape or type that the library
  // does not take; a sticky error of the device is remembered in its health.
  virtual absl::Status Queue(const LogitGemm& gemm, std::byte* workspace, cudaStream_t stream) = 0;
};

// InvalidArgument in builds without cuBLAS' declarations.
absl::Status CheckCublasIsBuilt();

// Loads the library (cublas_file.h) and makes its handle for the device that is current.
// FailedPrecondition, with the file and what would be right, when that is not possible.
absl::StatusOr<std::unique_ptr<LogitProducts>> NewCublasProducts(const std::string& path,
                                                                 DeviceHealth& health);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CUBLAS_PRODUCTS_H_
