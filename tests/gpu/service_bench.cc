// What a server costs on a device: the time it adds to the same operation in process, and what an
// engine beside it feels; and what an operation of a few observing heads takes beside one of all.
// JSON lines on stdout, the same as a table on stderr.
//
//   gpu_bench service --keepsetd FILE [--quick]
//
// KEEPSET_LAUNCHER: words before keepsetd. KEEPSET_TEST_SEED: the seed of the data, which every
// line names. Exit codes: 0 done, 1 a call failed or the two sides keep different positions, 2
// usage, 3 no device. Prompts have the shape of an 8B model and random queries and keys, which lie
// in one registered region of device memory. Both sides hand all layers over together.
#include "tests/gpu/service_bench.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/types/span.h"
#include "clients/cpp/client.h"
#include "clients/cpp/device_memory.h"
#include "engine/keepset.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/test_seed.h"
#include "tests/gpu/bench_report.h"
#include "tests/gpu/decode_loop.h"
#include "tests/integration/child_process.h"
#include "tests/integration/eventually.h"

namespace keepset::gpu {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kExitUsage = 2;
constexpr int kExitNoDevice = 3;
constexpr int64_t kLayers = 32;
constexpr int64_t kQoHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kHeadDim = 128;
constexpr int64_t kRows = 64;
constexpr int64_t kBudget = 512;
constexpr int64_t kElement = 2;
constexpr float kScale = 0.08838834764831845f;
constexpr const char* kPolicy = "snapkv";
constexpr int64_t kObservingHeads = 16;
constexpr const char* kModel =
    R"({"architecture":"bench","num_layers":32,"num_qo_heads":32,"num_kv_heads":8,"head_dim":128})";

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "gpu_bench: %s\n", what.c_str());
  std::exit(1);
}
void Require(const absl::Status& status) {
  if (!status.ok()) Die(status.ToString());
}
void Require(cudaError_t error) {
  if (error != cudaSuccess) Die(cudaGetErrorString(error));
}
void Require(keepset_status status) {
  if (status != KEEPSET_OK) Die(keepset_last_error());
}

std::string Seed() {
  const std::string text = fakes::TestSeedText();
  return text.empty() ? "fixed" : text;
}

// bf16 with mean 0 and variance 1: sums of four uniform numbers, which a host draws by the billion.
void FillRandom(uint64_t seed, std::vector<uint16_t>& values) {
  constexpr float kUniformMean = 0.5f * 65535.0f;
  constexpr float kUnit = 1.0f / (65536.0f * 0.57735027f);  // sqrt(4 / 12)
  uint64_t draw = seed;
  for (uint16_t& value : values) {
    draw = fakes::MixBits(draw);
    const auto sum = static_cast<float>((draw & 0xffff) + (draw >> 16 & 0xffff) +
                                        (draw >> 32 & 0xffff) + (draw >> 48));
    const float x = (sum - 4.0f * kUniformMean) * kUnit;
    uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16);
  }
}

// Queries, then keys, of every layer in one allocation.
class Prompt {
 public:
  explicit Prompt(int64_t seq_len) : seq_len_(seq_len) {
    Require(cudaMalloc(&data_, static_cast<size_t>(size_bytes())));
    std::vector<uint16_t> values(static_cast<size_t>((QueryBytes() + KeyBytes()) / kElement));
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      FillRandom(fakes::TestSeed(static_cast<uint32_t>(layer)), values);
      Require(cudaMemcpy(Queries(layer), values.data(), values.size() * sizeof(uint16_t),
                         cudaMemcpyHostToDevice));
    }
    // The last copy may still be under way, and other streams and processes do not wait for it.
    Require(cudaDeviceSynchronize());
  }
  ~Prompt() { static_cast<void>(cudaFree(data_)); }
  Prompt(const Prompt&) = delete;
  Prompt& operator=(const Prompt&) = delete;

  int64_t seq_len() const { return seq_len_; }
  void* data() const { return data_; }
  int64_t size_bytes() const { return kLayers * (QueryBytes() + KeyBytes()); }
  static int64_t QueryBytes() { return kQoHeads * kRows * kHeadDim * kElement; }
  int64_t KeyBytes() const { return kKvHeads * seq_len_ * kHeadDim * kElement; }
  std::byte* Queries(int64_t layer) const {
    return static_cast<std::byte*>(data_) + layer * (QueryBytes() + KeyBytes());
  }
  std::byte* Keys(int64_t layer) const { return Queries(layer) + QueryBytes(); }

 private:
  const int64_t seq_len_;
  void* data_ = nullptr;
};

// Operations of one policy; `layers` are those that are sent. `table` may be null.
class InProcess {
 public:
  InProcess(keepset_engine* engine, const char* policy, const keepset_table* table,
            std::vector<int64_t> layers)
      : engine_(engine), policy_(policy), table_(table), layers_(std::move(layers)) {}

  // What is kept: the sets of each layer, ascending positions.
  using KeptSets = std::vector<std::vector<std::vector<int32_t>>>;

  void Run(const Prompt& prompt) const {
    const Done done = Finish(prompt);
    keepset_operation_destroy(done.operation);
  }

  KeptSets Kept(const Prompt& prompt) const {
    const Done done = Finish(prompt);
    KeptSets layers;
    for (int64_t layer = 0; layer < keepset_result_num_layers(done.result); ++layer) {
      layers.emplace_back();
      for (int64_t set = 0; set < keepset_result_num_sets(done.result); ++set) {
        const int32_t* positions = nullptr;
        int64_t count = 0;
        Require(keepset_result_keep_indices(done.result, layer, set, &positions, &count));
        layers.back().emplace_back(positions, positions + count);
      }
    }
    keepset_operation_destroy(done.operation);
    return layers;
  }

 private:
  struct Done {
    keepset_operation* operation = nullptr;
    const keepset_result* result = nullptr;  // the operation's
  };

  Done Finish(const Prompt& prompt) const {
    keepset_operation_spec spec = {};
    spec.struct_size = sizeof(spec);
    spec.model_json = kModel;
    spec.seq_len = prompt.seq_len();
    spec.num_rows = kRows;
    spec.softmax_scale = kScale;
    spec.kv_dtype = KEEPSET_BF16;
    spec.policy = policy_;
    spec.table = table_;
    spec.budget_kind = KEEPSET_BUDGET_TOKENS;
    spec.budget = kBudget;
    spec.ppl = __builtin_nan("");
    Done done;
    Require(keepset_operation_begin(engine_, &spec, &done.operation));
    std::vector<keepset_layer_observation> observations;
    for (const int64_t layer : layers_) observations.push_back(Observation(prompt, layer));
    std::vector<const keepset_layer_observation*> pointers;
    for (const keepset_layer_observation& observation : observations) {
      pointers.push_back(&observation);
    }
    Require(keepset_operation_observe_layers(done.operation, layers_.data(), pointers.data(),
                                             layers_.size()));
    Require(keepset_operation_finish(done.operation, &done.result));
    return done;
  }

  static keepset_layer_observation Observation(const Prompt& prompt, int64_t layer) {
    keepset_layer_observation observation = {};
    observation.struct_size = sizeof(observation);
    observation.q_window.data = prompt.Queries(layer);
    observation.q_window.size_bytes = Prompt::QueryBytes();
    observation.q_window.dtype = KEEPSET_BF16;
    observation.q_window.num_qo_heads = kQoHeads;
    observation.q_window.num_rows = kRows;
    observation.q_window.last_dim = kHeadDim;
    observation.q_window.head_stride = kRows * kHeadDim;
    observation.q_window.row_stride = kHeadDim;
    observation.k.data = prompt.Keys(layer);
    observation.k.size_bytes = prompt.KeyBytes();
    observation.k.dtype = KEEPSET_BF16;
    observation.k.num_kv_heads = kKvHeads;
    observation.k.seq_len = prompt.seq_len();
    observation.k.head_dim = kHeadDim;
    observation.k.head_stride = prompt.seq_len() * kHeadDim;
    observation.k.token_stride = kHeadDim;
    return observation;
  }

  keepset_engine* const engine_;
  const char* const policy_;
  const keepset_table* const table_;
  const std::vector<int64_t> layers_;
};

// A prompt registered with a server.
class InService {
 public:
  InService(const std::string& address, const Prompt& prompt) {
    client::ClientOptions options;
    options.address = address;
    options.transport = client::Transport::kMemfd;
    auto client = client::Client::Connect(options);
    Require(client.status());
    client_ = *std::move(client);
    auto region = client::DeviceRegion::Export(prompt.data(), prompt.size_bytes());
    Require(region.status());
    region_ = *std::move(region);
    Require(client_->RegisterRegion(*region_, "kv", client::RegionAccess::kReadOnly));
    spec_.request_id = "gpu-bench";
    spec_.model = {"bench", kLayers, kQoHeads, kKvHeads, kHeadDim, "", ""};
    spec_.seq_len = prompt.seq_len();
    spec_.num_rows = kRows;
    spec_.softmax_scale = kScale;
    spec_.kv_dtype = client::DType::kBF16;
    spec_.policy = kPolicy;
    spec_.budget.kind = client::Budget::Kind::kTokens;
    spec_.budget.tokens = kBudget;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      client::LayerInput input;
      input.layer = layer;
      input.q_window.data = prompt.Queries(layer);
      input.q_window.size_bytes = Prompt::QueryBytes();
      input.q_window.dtype = client::DType::kBF16;
      input.k.data = prompt.Keys(layer);
      input.k.size_bytes = prompt.KeyBytes();
      input.k.dtype = client::DType::kBF16;
      layers_.push_back(std::move(input));
    }
  }

  void Run() { Require(client_->CompressUnary(spec_, layers_).status()); }

  InProcess::KeptSets Kept() {
    const auto result = client_->CompressUnary(spec_, layers_);
    Require(result.status());
    InProcess::KeptSets layers;
    for (const client::LayerResult& layer : result->layers) {
      layers.emplace_back();
      for (const client::KeepSet& set : layer.sets) layers.back().push_back(set.keep_indices);
    }
    return layers;
  }

 private:
  std::unique_ptr<client::DeviceRegion> region_;
  std::unique_ptr<client::Client> client_;
  client::OperationSpec spec_;
  std::vector<client::LayerInput> layers_;
};

// In process and by the server in turns, so that both see the same machine.
void MeasureAddedTime(const InProcess& engine, const std::string& address, int64_t seq_len,
                      int repeats) {
  const Prompt prompt(seq_len);
  InService service(address, prompt);
  if (engine.Kept(prompt) != service.Kept())
    Die("in process and by the server other rows are kept");
  std::vector<double> local;
  std::vector<double> remote;
  constexpr int kWarmUps = 5;
  for (int i = -kWarmUps; i < repeats; ++i) {
    const double in_process = HostMilliseconds([&] { engine.Run(prompt); });
    const double in_service = HostMilliseconds([&] { service.Run(); });
    if (i < 0) continue;
    local.push_back(in_process);
    remote.push_back(in_service);
  }
  Report({{"bench", "service"},
          {"policy", kPolicy},
          {"seq_len", seq_len},
          {"repeats", repeats},
          {"seed", Seed()},
          {"in_process_us_p50", 1e3 * Quantile(local, 0.5)},
          {"in_process_us_p99", 1e3 * Quantile(local, 0.99)},
          {"service_us_p50", 1e3 * Quantile(remote, 0.5)},
          {"service_us_p99", 1e3 * Quantile(remote, 0.99)},
          {"added_us_p50", 1e3 * (Quantile(remote, 0.5) - Quantile(local, 0.5))},
          {"added_us_p99", 1e3 * (Quantile(remote, 0.99) - Quantile(local, 0.99))}});
}

// The same prompt by snapkv, which reads every head, and by observation_heads, which reads one head
// of each of kObservingHeads layers, in turns.
void MeasureObservationHeads(keepset_engine* engine, const InProcess& all_heads,
                             const std::string& directory, int64_t seq_len, int repeats) {
  std::vector<keepset_head_observation> observations;
  std::vector<int64_t> layers;
  for (int64_t i = 0; i < kObservingHeads; ++i) {
    layers.push_back(i * kLayers / kObservingHeads);
    constexpr int32_t kMaxRows = 1;
    observations.push_back(
        {static_cast<int32_t>(layers.back()), static_cast<int32_t>(i % kQoHeads), kMaxRows, 1.0f});
  }
  const std::string path = absl::StrCat(directory, "/heads.keepset");
  Require(keepset_table_write_heads(path.c_str(), "bench-heads", "1", kModel, observations.data(),
                                    observations.size(), /*pool_kernel=*/5, /*dilate=*/12));
  keepset_table* table = nullptr;
  Require(keepset_table_load(path.c_str(), &table));
  const InProcess few_heads(engine, "observation_heads", table, layers);
  {
    const Prompt prompt(seq_len);
    std::vector<double> all;
    std::vector<double> few;
    constexpr int kWarmUps = 5;
    for (int i = -kWarmUps; i < repeats; ++i) {
      const double of_all = HostMilliseconds([&] { all_heads.Run(prompt); });
      const double of_few = HostMilliseconds([&] { few_heads.Run(prompt); });
      if (i < 0) continue;
      all.push_back(of_all);
      few.push_back(of_few);
    }
    Report({{"bench", "observation_heads"},
            {"against", kPolicy},
            {"heads", kObservingHeads},
            {"seq_len", seq_len},
            {"repeats", repeats},
            {"seed", Seed()},
            {"us_p50", 1e3 * Quantile(few, 0.5)},
            {"us_p99", 1e3 * Quantile(few, 0.99)},
            {"against_us_p50", 1e3 * Quantile(all, 0.5)},
            {"against_us_p99", 1e3 * Quantile(all, 0.99)},
            {"share", Quantile(few, 0.5) / Quantile(all, 0.5)}});
  }
  keepset_table_destroy(table);
}

// Steps of the engine while `beside` runs again and again on another thread; empty: alone.
void MeasureInterference(const std::string& mode, DecodeLoop& loop, int64_t seq_len, int steps,
                         const std::function<void()>& beside) {
  std::atomic<bool> is_over = false;
  std::vector<double> operations;
  std::thread other;
  if (beside) {
    beside();
    other = std::thread([&] {
      while (!is_over) operations.push_back(HostMilliseconds(beside));
    });
  }
  std::vector<double> times;
  for (int step = 0; step < steps; ++step) {
    times.push_back(HostMilliseconds([&] { Require(loop.Step()); }));
  }
  is_over = true;
  if (other.joinable()) other.join();
  Json line = {{"bench", "interference"},
               {"mode", mode},
               {"seq_len", seq_len},
               {"steps", steps},
               {"seed", Seed()},
               {"step_ms_p50", Quantile(times, 0.5)},
               {"step_ms_p99", Quantile(times, 0.99)}};
  if (!operations.empty()) {
    line["operations"] = operations.size();
    line["operation_ms_p50"] = Quantile(operations, 0.5);
    line["operation_ms_p99"] = Quantile(operations, 0.99);
  }
  Report(line);
}

std::unique_ptr<integration::ChildProcess> StartServer(const std::string& keepsetd,
                                                       const std::string& directory,
                                                       const std::string& address) {
  const std::string config = directory + "/keepsetd.conf";
  std::ofstream(config) << "backend: \"cuda\"\n";
  // Its log goes into a file: nobody reads a pipe while it is timed.
  std::vector<std::string> words = {
      "/bin/sh", "-c", absl::StrCat("exec \"$0\" \"$@\" 2>", directory, "/keepsetd.log")};
  const char* const launcher = std::getenv("KEEPSET_LAUNCHER");
  for (const absl::string_view word :
       absl::StrSplit(launcher == nullptr ? "" : launcher, ' ', absl::SkipEmpty())) {
    words.emplace_back(word);
  }
  words.insert(words.end(),
               {keepsetd, "--config", config, "--listen", address, "--metrics-listen", "off"});
  auto server = std::make_unique<integration::ChildProcess>(
      words, integration::ChildProcess::Output::kStdout);
  client::ClientOptions options;
  options.address = address;
  options.transport = client::Transport::kInline;
  const bool is_ready = integration::Eventually(
      [&] { return server->HasEnded() || client::Client::Connect(options).ok(); });
  if (!is_ready || server->HasEnded()) Die("keepsetd does not start");
  return server;
}

}  // namespace

int RunServiceBench(absl::Span<const char* const> arguments) {
  std::string keepsetd;
  bool is_quick = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string word = arguments[i];
    if (word == "--quick") {
      is_quick = true;
    } else if (word == "--keepsetd" && i + 1 < arguments.size()) {
      keepsetd = arguments[++i];
    } else {
      std::fprintf(stderr, "usage: gpu_bench service --keepsetd FILE [--quick]\n");
      return kExitUsage;
    }
  }
  keepset_engine_options options = {};
  options.struct_size = sizeof(options);
  options.backend = "cuda";
  keepset_engine* engine = nullptr;
  if (keepset_engine_create(&options, &engine) != KEEPSET_OK) {
    const std::string error = keepset_last_error();
    std::fprintf(stderr, "%s\n", error.c_str());
    return absl::StrContains(error, "no device") ? kExitNoDevice : 1;
  }
  if (keepsetd.empty()) Die("want --keepsetd FILE");
  std::string directory = std::filesystem::temp_directory_path() / "keepset-bench-XXXXXX";
  if (::mkdtemp(directory.data()) == nullptr) Die(absl::StrCat("cannot make ", directory));
  const std::string address = absl::StrCat("unix:", directory, "/k.sock");
  {
    const auto server = StartServer(keepsetd, directory, address);
    std::vector<int64_t> every_layer(kLayers);
    std::iota(every_layer.begin(), every_layer.end(), 0);
    const InProcess in_process(engine, kPolicy, nullptr, every_layer);
    MeasureAddedTime(in_process, address, 1024, is_quick ? 20 : 500);
    MeasureAddedTime(in_process, address, is_quick ? 4096 : 32768, is_quick ? 20 : 200);
    MeasureObservationHeads(engine, in_process, directory, is_quick ? 4096 : 32768,
                            is_quick ? 20 : 200);
    const Prompt prompt(is_quick ? 4096 : 32768);
    InService service(address, prompt);
    DecodeLoop loop;
    Require(loop.Init());
    Require(loop.Step());
    const int steps = is_quick ? 100 : 5000;
    MeasureInterference("alone", loop, prompt.seq_len(), steps, nullptr);
    MeasureInterference("in_process", loop, prompt.seq_len(), steps,
                        [&] { in_process.Run(prompt); });
    MeasureInterference("second_process", loop, prompt.seq_len(), steps, [&] { service.Run(); });
  }
  keepset_engine_destroy(engine);
  std::filesystem::remove_all(directory);
  return 0;
}

}  // namespace keepset::gpu
