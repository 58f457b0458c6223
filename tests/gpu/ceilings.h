// What the device can do at most, measured in the same run as the kernels: the yardstick of their
// figures. Every function waits, and returns the median of several repetitions
// after warm-ups, as the kernels are timed.
#ifndef KEEPSET_TESTS_GPU_CEILINGS_H_
#define KEEPSET_TESTS_GPU_CEILINGS_H_

#include <cstdint>
#include <string>

namespace keepset::gpu {

struct Ceilings {
  double copy_gb_per_s = 0.0;  // device to device, bytes read plus bytes written
  double exp2_per_ns = 0.0;    // ex2.approx of the whole device
  double gemm_tflops = 0.0;    // bf16, 8192 cubed, cuBLAS; 0 when it is not there
  double launch_us = 0.0;      // an empty kernel and a wait for it
  std::string gemm_note;       // why gemm_tflops is 0
};

// Error text when a CUDA call failed, else empty.
std::string MeasureCeilings(Ceilings* ceilings);

// The products alone of window scores, by cuBLAS: bf16 logits of every layer written out, softmax
// and reduction left away. What a path through a library would cost at least.
struct LogitsShape {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t rows = 0;  // that share a KV head
  int64_t seq_len = 0;
  int64_t head_dim = 0;
};
// note: why there is no time. Error text when a CUDA call failed, else empty.
std::string MeasureLogitsByGemm(const LogitsShape& shape, double* milliseconds, std::string* note);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_CEILINGS_H_
