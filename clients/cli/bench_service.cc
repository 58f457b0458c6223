#include <algorithm>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "clients/cli/bench_command.h"
#include "clients/cli/bench_workload.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/remote_layers.h"
#include "clients/cli/server_connection.h"
#include "clients/cli/server_process.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

// Little work per layer, so that what the service adds is not lost in the noise of the work.
constexpr const char* kPolicy = "tova";
constexpr int64_t kTokens = 256;
constexpr int64_t kBudgetTokens = 64;
constexpr int64_t kRows = 1;
constexpr int64_t kWarmUps = 3;
constexpr int64_t kDefaultRepeats = 200;
constexpr int64_t kQuickRepeats = 5;
constexpr int64_t kMaxRepeats = 100000;

client::OperationSpec ClientSpec(const BenchShape& shape, const keepset_operation_spec& spec) {
  client::OperationSpec out;
  out.request_id = "bench";
  out.model = {"bench",
               shape.num_layers,
               shape.num_qo_heads,
               shape.num_kv_heads,
               shape.head_dim,
               R"({"theta":500000.0})",
               "bench"};
  out.seq_len = shape.seq_len;
  out.num_rows = shape.window;
  out.softmax_scale = spec.softmax_scale;
  out.kv_dtype = client::DType::kBF16;
  out.policy = kPolicy;
  out.budget.kind = client::Budget::Kind::kTokens;
  out.budget.tokens = kBudgetTokens;
  return out;
}

struct Samples {
  std::vector<double> in_process;
  std::vector<double> service;
  // What the server says it spent.
  std::vector<double> queue;
  std::vector<double> lease;
  std::vector<double> work;
};

using RemoteCall = std::function<absl::StatusOr<client::OperationResult>()>;

absl::Status TimeRemote(const RemoteCall& call, Samples& samples) {
  const absl::Time start = absl::Now();
  KEEPSET_ASSIGN_OR_RETURN(const client::OperationResult result, call());
  samples.service.push_back(absl::ToDoubleSeconds(absl::Now() - start));
  samples.queue.push_back(result.stages.queue);
  samples.lease.push_back(result.stages.lease);
  samples.work.push_back(result.stages.score + result.stages.select);
  return absl::OkStatus();
}

Json Line(const std::string& transport, const std::string& rpc, const BenchShape& shape,
          const Samples& samples) {
  const double in_process_p50 = Quantile(samples.in_process, 0.5);
  const double in_process_p99 = Quantile(samples.in_process, 0.99);
  const double service_p50 = Quantile(samples.service, 0.5);
  const double service_p99 = Quantile(samples.service, 0.99);
  return {{"bench", "service"},
          {"policy", kPolicy},
          {"transport", transport},
          {"rpc", rpc},
          {"layers", shape.num_layers},
          {"tokens", shape.seq_len},
          {"repeats", samples.service.size()},
          {"in_process_us_p50", 1e6 * in_process_p50},
          {"in_process_us_p99", 1e6 * in_process_p99},
          {"service_us_p50", 1e6 * service_p50},
          {"service_us_p99", 1e6 * service_p99},
          {"added_us_p50", 1e6 * (service_p50 - in_process_p50)},
          {"added_us_p99", 1e6 * (service_p99 - in_process_p99)},
          {"server_queue_us_p50", 1e6 * Quantile(samples.queue, 0.5)},
          {"server_lease_us_p50", 1e6 * Quantile(samples.lease, 0.5)},
          {"server_work_us_p50", 1e6 * Quantile(samples.work, 0.5)},
          {"ratio_to_in_process", service_p50 / in_process_p50}};
}

// All four paths of one operation size. In-process and service calls alternate, so that both see
// the same machine.
absl::Status MeasureShape(keepset_engine* engine, const std::string& address, int64_t num_layers,
                          int64_t repeats, Progress& progress, Console& console) {
  BenchShape shape;
  shape.num_layers = num_layers;
  shape.seq_len = kTokens;
  shape.window = kRows;
  const BenchWorkload workload(shape);
  keepset_operation_spec spec = workload.Spec();
  spec.policy = kPolicy;
  spec.budget_kind = KEEPSET_BUDGET_TOKENS;
  spec.budget = kBudgetTokens;
  const client::OperationSpec remote_spec = ClientSpec(shape, spec);

  for (const client::Transport transport :
       {client::Transport::kMemfd, client::Transport::kInline}) {
    client::ClientOptions options;
    options.address = address;
    options.transport = transport;
    options.engine = "keepset-bench";
    const std::string transport_name(client::TransportName(transport));
    absl::StatusOr<std::unique_ptr<client::Client>> client = ConnectToServer(options);
    if (!client.ok() && absl::IsFailedPrecondition(client.status())) {
      console.out << Json{{"bench", "service"},
                          {"transport", transport_name},
                          {"skipped", std::string(client.status().message())}}
                         .dump()
                  << std::endl;
      continue;
    }
    KEEPSET_RETURN_IF_ERROR(client.status());
    // As in process, one layer's tensors stand for all: both sides find the same bytes in cache.
    client::LayerInput first = ToLayerInput(0, workload.observation());
    first.v = {};  // the policy reads no values
    KEEPSET_ASSIGN_OR_RETURN(RemoteLayers layers,
                             PlaceLayers(**client, {std::move(first)}, kTokens, GatherWish::kNone));
    layers.inputs.assign(num_layers, client::LayerInput(layers.inputs.front()));
    for (int64_t layer = 0; layer < num_layers; ++layer) layers.inputs[layer].layer = layer;
    std::unique_ptr<client::CompressStream> stream;  // opened after the unary calls
    const std::pair<std::string, RemoteCall> rpcs[] = {
        {"unary", [&] { return (*client)->CompressUnary(remote_spec, layers.inputs); }},
        {"stream",
         [&]() -> absl::StatusOr<client::OperationResult> {
           KEEPSET_ASSIGN_OR_RETURN(const uint64_t operation, stream->Begin(remote_spec));
           for (const client::LayerInput& layer : layers.inputs) {
             KEEPSET_RETURN_IF_ERROR(stream->SendLayer(operation, layer));
           }
           return stream->Finish(operation);
         }},
    };
    for (const auto& [rpc, call] : rpcs) {
      // Its threads would share the replies of the unary calls.
      if (rpc == "stream") {
        KEEPSET_ASSIGN_OR_RETURN(stream, (*client)->OpenStream());
      }
      Samples samples;
      for (int64_t repeat = -kWarmUps; repeat < repeats; ++repeat) {
        progress.Show(absl::StrCat("service, ", num_layers, " layers, ", transport_name, " ", rpc,
                                   ": ", std::max<int64_t>(0, repeat), "/", repeats));
        KEEPSET_ASSIGN_OR_RETURN(const TimedOperation local, TimeInProcess(engine, spec, workload));
        Samples warm_up;
        KEEPSET_RETURN_IF_ERROR(TimeRemote(call, repeat < 0 ? warm_up : samples));
        if (repeat >= 0) samples.in_process.push_back(local.total_seconds);
      }
      progress.Clear();
      console.out << Line(transport_name, rpc, shape, samples).dump() << std::endl;
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunBenchService(absl::Span<const std::string> arguments, Console& console) {
  std::optional<std::string> server;
  std::optional<std::string> keepsetd;
  std::optional<int64_t> repeats;
  bool quick = false;
  bool json = false;
  FlagParser parser("bench service",
                    "bench service [--server ADDR | --keepsetd FILE] [--repeats N]",
                    "Microseconds a server adds to the same operation in process: 1 and 32 layers, "
                    "memfd and\ninline, unary and stream. Without --server a keepsetd is started "
                    "on a temporary socket.");
  parser.Text("--server", "ADDR", "a running server on this machine", &server)
      .Text("--keepsetd", "FILE", "the server to start", &keepsetd)
      .Int("--repeats", "N", "timed repeats, default 200", &repeats)
      .Switch("--quick", "five repeats: whether it still runs", &quick)
      .Switch("--json", "no effect beside errors: the output is JSON lines", &json);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_RETURN_IF_ERROR(parser.Parse(arguments, 0, 0).status());
  if (server.has_value() && keepsetd.has_value()) {
    return UsageError("--server and --keepsetd exclude each other");
  }
  const int64_t count = repeats.value_or(quick ? kQuickRepeats : kDefaultRepeats);
  if (count < 1 || count > kMaxRepeats) {
    return RefusedError(absl::StrCat("--repeats=", count, ", want 1..", kMaxRepeats));
  }
  std::unique_ptr<ServerProcess> process;
  std::string address = server.value_or("");
  if (!server.has_value()) {
    std::string binary = keepsetd.value_or("");
    if (binary.empty()) {
      absl::StatusOr<std::string> found = ServerProcess::FindBinary(console.program_path);
      if (!found.ok()) return WithExitCode(found.status(), ExitCode::kUsage);
      binary = *std::move(found);
    }
    KEEPSET_RETURN_IF_ERROR(CheckFileExists("keepsetd", binary));
    KEEPSET_ASSIGN_OR_RETURN(process, ServerProcess::Start(binary));
    address = process->address();
  }
  KEEPSET_ASSIGN_OR_RETURN(const EngineHandle engine, NewEngine(0));
  Progress progress(console);
  for (int64_t num_layers : {int64_t{1}, BenchShape().num_layers}) {
    KEEPSET_RETURN_IF_ERROR(
        MeasureShape(engine.get(), address, num_layers, count, progress, console));
  }
  return absl::OkStatus();
}

}  // namespace keepset::cli
