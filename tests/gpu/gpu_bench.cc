// Figures of the CUDA backend on this machine's device: JSON lines on stdout, a table on stderr.
//
//   gpu_bench --probe        the device as one JSON line
//   gpu_bench [--quick]      ceilings, then kernels against their floors
//   gpu_bench service ...    keepsetd beside it: service_bench.cc
//   gpu_bench targets DIR    which targets the lines in DIR reach: targets.h
//
// Exit codes: 0 done, 3 no device (stderr says why), 2 usage, 1 a call failed. device_*: by events
// around queued work, with a cold L2 cache; call_*: by the host's clock, with copies and the wait.
// Medians, and 99th percentiles beside them. Prompts have the shape of an 8B model: 32 layers, 32
// query and 8 KV heads, head dimension 128, 64 rows, bf16.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/backend_registry.h"
#include "kernels/compute_backend.h"
#include "nlohmann/json.hpp"
#include "tests/gpu/bench_device.h"
#include "tests/gpu/bench_machine.h"
#include "tests/gpu/bench_report.h"
#include "tests/gpu/ceilings.h"
#include "tests/gpu/selection_bench.h"
#include "tests/gpu/service_bench.h"
#include "tests/gpu/targets.h"
#include "tests/gpu/window_bench.h"

namespace keepset::gpu {
namespace {

constexpr int kExitNoDevice = 3;
constexpr int64_t kLengths[] = {1024, 4096, 32768, 131072};
constexpr int64_t kLongestQuick = 4096;

struct Repetitions {
  int window_scores = 101;
  int selection = 1001;
};

// Every length of the speed contract.
void BenchLengths(const BenchMachine& machine, int64_t longest, absl::Span<const Calls> calls) {
  for (const int64_t seq_len : kLengths) {
    if (seq_len > longest) continue;
    for (const Lse lse : {Lse::kComputed, Lse::kGiven}) {
      for (const Pages pages : {Pages::kContiguous, Pages::kPaged}) {
        for (const Calls how : calls) {
          BenchWindowScores(machine, {seq_len, 128, lse, pages, how});
        }
      }
    }
  }
}

// Of the other head dimensions of models.
void BenchHeadDims(const BenchMachine& machine, int64_t longest) {
  for (const int64_t seq_len : {4096, 32768}) {
    if (seq_len > longest) continue;
    for (const int64_t head_dim : {80, 96, 128, 192, 256}) {
      BenchWindowScores(machine, {seq_len, head_dim});
    }
  }
}

// Of smaller windows.
void BenchRows(const BenchMachine& machine, int64_t longest) {
  for (const int64_t seq_len : {4096, 32768}) {
    if (seq_len > longest) continue;
    for (const int64_t rows : {16, 32}) {
      WindowCase shape;
      shape.seq_len = seq_len;
      shape.rows = rows;
      BenchWindowScores(machine, shape);
    }
  }
}

// A backend with the kernels named; or null, with a line that says why.
std::unique_ptr<kernels::ComputeBackend> BackendWith(const char* window_kernels) {
  auto backend = kernels::NewBackend("cuda", {.window_kernels = window_kernels});
  if (backend.ok()) return *std::move(backend);
  Report({{"bench", "window_scores"},
          {"path", window_kernels},
          {"skipped", std::string(backend.status().message())}});
  return nullptr;
}

// The kernels with Hopper's own instructions, all layers in one call.
void BenchHopper(const Ceilings& ceilings, int repetitions, int64_t longest) {
  const auto backend = BackendWith("hopper");
  if (backend == nullptr) return;
  BenchLengths({*backend, ceilings, repetitions}, longest, {Calls::kAllLayers});
}

// Products by cuBLAS, all layers in one call: the peer among our own kernels.
void BenchCublas(const Ceilings& ceilings, int repetitions, int64_t longest) {
  const auto backend = BackendWith("cublas");
  if (backend == nullptr) return;
  const BenchMachine machine = {*backend, ceilings, repetitions};
  BenchLengths(machine, longest, {Calls::kAllLayers});
  BenchHeadDims(machine, longest);
  BenchRows(machine, longest);
}

void BenchPortable(kernels::ComputeBackend& backend, const Ceilings& ceilings,
                   const Repetitions& repetitions, int64_t longest) {
  const BenchMachine windows = {backend, ceilings, repetitions.window_scores};
  BenchLengths(windows, longest, {Calls::kPerLayer, Calls::kAllLayers});
  BenchHeadDims(windows, longest);
  BenchRows(windows, longest);
  for (const int64_t seq_len : {4096, 32768}) {
    if (seq_len > longest) continue;
    for (const int64_t head_dim : {80, 96, 128, 192, 256}) BenchLogits(seq_len, head_dim);
  }
  const BenchMachine selections = {backend, ceilings, repetitions.selection};
  BenchSelect(selections, 32, 32768, 512);
  BenchSelect(selections, 256, 32768, 512);
  BenchSelect(selections, 1, 1 << 20, 8192);
  BenchGather(selections, 1, 32768, 512);
  BenchGather(selections, 32, 32768, 512);
  BenchGather(selections, 1, 32768, 8192);
}

int Main(absl::Span<const char* const> arguments) {
  const auto has = [&](absl::string_view flag) {
    return std::any_of(arguments.begin(), arguments.end(),
                       [&](const char* argument) { return argument == flag; });
  };
  if (!arguments.empty() && absl::string_view(arguments.front()) == "service") {
    return RunServiceBench(arguments.subspan(1));
  }
  if (!arguments.empty() && absl::string_view(arguments.front()) == "targets") {
    return RunTargets(arguments.subspan(1));
  }
  auto backend = kernels::NewBackend("cuda", {.window_kernels = "portable"});
  if (!backend.ok()) {
    std::fprintf(stderr, "%s\n", std::string(backend.status().message()).c_str());
    return absl::StrContains(backend.status().message(), "no device") ? kExitNoDevice : 1;
  }
  const kernels::DeviceInfo device = (*backend)->Device();
  Report({{"bench", "device"},
          {"backend", (*backend)->name()},
          {"name", device.name},
          {"uuid", device.uuid},
          {"driver_supports_cuda", device.driver_version},
          {"note", device.note}});
  if (has("--probe")) return 0;
  Ceilings ceilings;
  if (const std::string error = MeasureCeilings(&ceilings); !error.empty()) {
    std::fprintf(stderr, "gpu_bench: %s\n", error.c_str());
    return 1;
  }
  Report({{"bench", "ceilings"},
          {"copy_gb_per_s", ceilings.copy_gb_per_s},
          {"exp2_per_ns", ceilings.exp2_per_ns},
          {"gemm_tflops", ceilings.gemm_tflops},
          {"gemm_note", ceilings.gemm_note},
          {"launch_us", ceilings.launch_us}});
  const bool is_quick = has("--quick");
  const Repetitions repetitions = is_quick ? Repetitions{5, 21} : Repetitions{};
  const int64_t longest = is_quick ? kLongestQuick : kLengths[std::size(kLengths) - 1];
  BenchPortable(**backend, ceilings, repetitions, longest);
  BenchHopper(ceilings, repetitions.window_scores, longest);
  BenchCublas(ceilings, repetitions.window_scores, longest);
  return 0;
}

}  // namespace
}  // namespace keepset::gpu

int main(int argc, char** argv) {
  return keepset::gpu::Main(absl::MakeConstSpan(argv + 1, argc > 0 ? argc - 1 : 0));
}
