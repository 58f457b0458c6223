// Selection and gather: what the device takes for the kernel (device_*), and what a call of the
// backend takes with its copies and its wait (call_*).
#ifndef KEEPSET_TESTS_GPU_SELECTION_BENCH_H_
#define KEEPSET_TESTS_GPU_SELECTION_BENCH_H_

#include <cstdint>

#include "tests/gpu/bench_machine.h"

namespace keepset::gpu {

void BenchSelect(const BenchMachine& machine, int64_t rows, int64_t length, int64_t budget);

// K and V of `layers` layers of 8 KV heads of 128 bf16 values in one call.
void BenchGather(const BenchMachine& machine, int64_t layers, int64_t seq_len, int64_t budget);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_SELECTION_BENCH_H_
