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
#include "absl/types/span.h"
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

// Products on one device, which is current when they are queued. Thread-safe. To end them waits for
// the whole device.
class LogitProducts {
 public:
  virtual ~LogitProducts() = default;

  // Queues the products on `stream`, neither waiting nor allocating, except that the driver loads a
  // kernel of the library when it is first used. workspace: kCublasWorkspaceBytes that no other
  // stream uses. The same arguments give the same bits on one device with one version of the
  // library. InvalidArgument for a shape or type that the library does not take; a sticky error of
  // the device is remembered in its health.
  virtual absl::Status Queue(const LogitGemm& gemm, std::byte* workspace, cudaStream_t stream) = 0;
};

// InvalidArgument in builds without cuBLAS' declarations.
absl::Status CheckCublasIsBuilt();

// The first of `files` (CublasFile::Names) that loads, has every function and makes a handle for
// the device that is current. FailedPrecondition, with the files and what would be right, when none
// does; ResourceExhausted when the device has no memory for the first handle. `health` must outlive
// it.
absl::StatusOr<std::unique_ptr<LogitProducts>> NewCublasProducts(
    absl::Span<const std::string> files, DeviceHealth& health);

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_KERNELS_CUDA_CUBLAS_PRODUCTS_H_
