// The part of gpu_bench that runs keepsetd beside it.
#ifndef KEEPSET_TESTS_GPU_SERVICE_BENCH_H_
#define KEEPSET_TESTS_GPU_SERVICE_BENCH_H_

#include "absl/types/span.h"

namespace keepset::gpu {

// Words behind `gpu_bench service`; returns the exit code of gpu_bench.
int RunServiceBench(absl::Span<const char* const> arguments);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_SERVICE_BENCH_H_
