#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "clients/cli/bench_command.h"
#include "clients/cli/bench_workload.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/temporary_directory.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kBudgetTokens = 512;
constexpr double kPerplexity = 12.7;
constexpr int64_t kTokens[] = {1024, 4096, 8192};
constexpr int64_t kDefaultRepeats = 5;
constexpr int64_t kMaxRepeats = 100000;
constexpr absl::string_view kHeadsPolicy = "observation_heads";

struct EngineBenchOptions {
  std::string policy = "compilerkv";
  int64_t repeats = kDefaultRepeats;
  int64_t num_layers = BenchShape().num_layers;
  std::vector<int64_t> num_heads{16};  // of observation_heads tables, one after the other
  std::vector<int64_t> tokens{std::begin(kTokens), std::end(kTokens)};
};

absl::StatusOr<TableHandle> UniformTable(const std::string& model_json) {
  KEEPSET_ASSIGN_OR_RETURN(const TemporaryDirectory directory, TemporaryDirectory::Create());
  const std::string path = directory.path() + "/uniform.keepset";
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_table_write_uniform(
      path.c_str(), "bench-uniform", "1", model_json.c_str(), 1.0f, 0.8f, nullptr, 0)));
  return LoadTable(path);
}

// Heads spread over the layers, largest value over the observed rows, pooling and dilation on.
absl::StatusOr<TableHandle> HeadsTable(const std::string& model_json, const BenchShape& shape,
                                       int64_t num_heads) {
  KEEPSET_ASSIGN_OR_RETURN(const TemporaryDirectory directory, TemporaryDirectory::Create());
  const std::string path = directory.path() + "/heads.keepset";
  std::vector<keepset_head_observation> observations;
  for (int64_t i = 0; i < num_heads; ++i) {
    const int64_t place = i * shape.num_layers * shape.num_qo_heads / num_heads;
    const auto layer = static_cast<int32_t>(place / shape.num_qo_heads);
    const auto head = static_cast<int32_t>(place % shape.num_qo_heads);
    observations.push_back({layer, head, 1, 1.0f});
  }
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_table_write_heads(
      path.c_str(), "bench-heads", "1", model_json.c_str(), observations.data(),
      observations.size(), /*pool_kernel=*/5, /*dilate=*/12)));
  return LoadTable(path);
}

// Multiply-adds of one layer's Q K^T of the heads and rows that the policy of `spec` reads, summed
// over the layers, in units of 1e9 operations; 0 for a policy that reads no queries.
absl::StatusOr<double> LogitsGflop(keepset_engine* engine, const keepset_operation_spec& spec,
                                   const BenchShape& shape) {
  keepset_report* raw = nullptr;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_input_needs(engine, &spec, &raw)));
  const std::unique_ptr<keepset_report, CDeleter<keepset_report_destroy>> report(raw);
  const Json needs = Json::parse(keepset_report_json(report.get()), nullptr, false);
  if (!needs.is_object() || !needs.contains("layers")) {
    return absl::InternalError("input needs: not a JSON object with layers");
  }
  const int64_t max_rows = needs.value("max_rows", int64_t{0});
  const int64_t rows = max_rows == 0 ? shape.window : std::min(max_rows, shape.window);
  int64_t heads = 0;
  for (const Json& layer : needs["layers"]) {
    if (!layer.value("queries", false)) continue;
    const auto listed = static_cast<int64_t>(layer.value("qo_heads", Json::array()).size());
    heads += listed == 0 ? shape.num_qo_heads : listed;
  }
  return 2e-9 * static_cast<double>(heads * rows) * static_cast<double>(shape.seq_len) *
         static_cast<double>(shape.head_dim);
}

// num_heads: of the table of policy observation_heads.
absl::StatusOr<Json> Measure(keepset_engine* engine, const EngineBenchOptions& options,
                             int64_t tokens, int64_t num_heads, Progress& progress) {
  BenchShape shape;
  shape.num_layers = options.num_layers;
  shape.seq_len = tokens;
  const BenchWorkload workload(shape);
  keepset_operation_spec spec = workload.Spec();
  spec.policy = options.policy.c_str();
  spec.budget_kind = KEEPSET_BUDGET_TOKENS;
  spec.budget = kBudgetTokens;
  spec.ppl = kPerplexity;
  TableHandle table;
  if (options.policy == "compilerkv") {
    KEEPSET_ASSIGN_OR_RETURN(table, UniformTable(workload.model_json()));
    spec.table = table.get();
  } else if (options.policy == kHeadsPolicy) {
    KEEPSET_ASSIGN_OR_RETURN(table, HeadsTable(workload.model_json(), shape, num_heads));
    spec.table = table.get();
  }
  // The machine's clock moves: the yardstick is the better of before and after.
  double peak_before = 0.0;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_engine_measure_peak(engine, &peak_before)));
  progress.Show(absl::StrCat("engine, ", tokens, " tokens: warm-up"));
  KEEPSET_RETURN_IF_ERROR(TimeInProcess(engine, spec, workload).status());
  std::vector<double> total;
  std::vector<double> score;
  std::vector<double> select;
  std::string outcome;
  for (int64_t repeat = 0; repeat < options.repeats; ++repeat) {
    progress.Show(absl::StrCat("engine, ", tokens, " tokens: ", repeat + 1, "/", options.repeats));
    KEEPSET_ASSIGN_OR_RETURN(const TimedOperation timed, TimeInProcess(engine, spec, workload));
    total.push_back(timed.total_seconds);
    score.push_back(timed.score_seconds);
    select.push_back(timed.select_seconds);
    outcome = timed.outcome;
  }
  double peak_after = 0.0;
  KEEPSET_RETURN_IF_ERROR(FromEngine(keepset_engine_measure_peak(engine, &peak_after)));
  const double peak_gflops = std::max(peak_before, peak_after);
  progress.Clear();

  // One multiply-add per element of Q K^T: the least any exact method does. The score stage also
  // holds exponentials, row sums and value norms, so its rate understates the logits part.
  KEEPSET_ASSIGN_OR_RETURN(const double logits_gflop, LogitsGflop(engine, spec, shape));
  const double score_p50 = Quantile(score, 0.5);
  const double token_heads = static_cast<double>(tokens * shape.num_kv_heads * shape.num_layers);
  Json line{{"bench", "engine"},
            {"policy", options.policy},
            {"backend", keepset_engine_backend(engine)},
            {"layers", shape.num_layers},
            {"qo_heads", shape.num_qo_heads},
            {"kv_heads", shape.num_kv_heads},
            {"head_dim", shape.head_dim},
            {"window", shape.window},
            {"dtype", "bf16"},
            {"tokens", tokens},
            {"repeats", options.repeats},
            {"outcome", outcome},
            {"seconds_p50", Quantile(total, 0.5)},
            {"seconds_p99", Quantile(total, 0.99)},
            {"score_seconds_p50", score_p50},
            {"select_seconds_p50", Quantile(select, 0.5)},
            {"ns_per_token_kv_head", 1e9 * Quantile(total, 0.5) / token_heads},
            {"logits_gflops", nullptr},
            {"peak_gflops", peak_gflops},
            {"share_of_peak", nullptr},
            {"floor_seconds", nullptr},
            {"ratio_to_floor", nullptr}};
  if (logits_gflop > 0.0) {
    const double floor_seconds = logits_gflop / peak_gflops;
    line["logits_gflops"] = logits_gflop / score_p50;
    line["share_of_peak"] = logits_gflop / score_p50 / peak_gflops;
    line["floor_seconds"] = floor_seconds;
    line["ratio_to_floor"] = score_p50 / floor_seconds;
  }
  if (options.policy == kHeadsPolicy) line["heads"] = num_heads;
  return line;
}

absl::StatusOr<std::vector<int64_t>> ParseHeads(const std::string& text, int64_t most) {
  std::vector<int64_t> counts;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    int64_t count;
    if (!absl::SimpleAtoi(part, &count)) {
      return UsageError(absl::StrCat("--heads=", text, ", want integers such as 1,16"));
    }
    if (count < 1 || count > most) {
      return RefusedError(absl::StrCat("--heads=", text, ": ", count, ", want 1..", most));
    }
    counts.push_back(count);
  }
  return counts;
}

}  // namespace

absl::Status RunBenchEngine(absl::Span<const std::string> arguments, Console& console) {
  EngineBenchOptions options;
  std::optional<std::string> policy;
  std::optional<int64_t> repeats;
  std::optional<int64_t> threads;
  std::optional<int64_t> tokens;
  std::optional<std::string> heads;
  std::optional<std::string> against;
  bool quick = false;
  bool json = false;
  FlagParser parser("bench engine", "bench engine [--policy NAME] [--tokens N] [--repeats N]",
                    "Times one prompt of the 8B shape (32 layers, 32/8 heads, head_dim 128, window "
                    "64, bf16)\nat 1k, 4k and 8k tokens. floor_seconds is the logits' "
                    "multiply-adds at the measured peak (null where no "
                    "queries\nare read); ns_per_token_kv_head is per layer.");
  parser.Text("--policy", "NAME", "default compilerkv, with a uniform table", &policy)
      .Int("--tokens", "N", "this length only", &tokens)
      .Int("--repeats", "N", "timed repeats, default 5", &repeats)
      .Text("--heads", "N,..", "heads of the observation_heads tables, one each; default 16",
            &heads)
      .Text("--against", "NAME", "time this policy too and print the share of its time", &against)
      .Int("--threads", "N", "CPU threads (0: all cores)", &threads)
      .Switch("--quick", "2 layers of 1k tokens, twice: whether it still runs", &quick)
      .Switch("--json", "no effect beside errors: the output is JSON lines", &json);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_RETURN_IF_ERROR(parser.Parse(arguments, 0, 0).status());
  if (quick) {
    options.tokens = {kTokens[0]};
    options.num_layers = 2;
    options.repeats = 2;
  }
  if (policy.has_value()) options.policy = *policy;
  if (tokens.has_value()) options.tokens = {*tokens};
  if (heads.has_value()) {
    KEEPSET_ASSIGN_OR_RETURN(options.num_heads,
                             ParseHeads(*heads, options.num_layers * BenchShape().num_qo_heads));
  }
  // No other policy has heads to count.
  if (options.policy != kHeadsPolicy) options.num_heads.resize(1);
  if (repeats.has_value()) options.repeats = *repeats;
  if (options.repeats < 1 || options.repeats > kMaxRepeats) {
    return RefusedError(absl::StrCat("--repeats=", options.repeats, ", want 1..", kMaxRepeats));
  }
  for (int64_t length : options.tokens) {
    // A prompt within the budget is kept whole, and there is nothing to time.
    if (length <= kBudgetTokens || length > (int64_t{1} << 20)) {
      return RefusedError(absl::StrCat("--tokens=", length, ", want ", kBudgetTokens + 1,
                                       "..1048576, more than the budget"));
    }
  }
  KEEPSET_ASSIGN_OR_RETURN(const EngineHandle engine, NewEngine(threads.value_or(0)));
  Progress progress(console);
  for (int64_t length : options.tokens) {
    double reference_seconds = 1.0;
    if (against.has_value()) {
      EngineBenchOptions other = options;
      other.policy = *against;
      KEEPSET_ASSIGN_OR_RETURN(const Json reference, Measure(engine.get(), other, length,
                                                             options.num_heads.front(), progress));
      console.out << reference.dump() << std::endl;
      reference_seconds = reference.value("seconds_p50", 1.0);
    }
    for (int64_t num_heads : options.num_heads) {
      KEEPSET_ASSIGN_OR_RETURN(Json line,
                               Measure(engine.get(), options, length, num_heads, progress));
      if (against.has_value()) {
        line["share_of_time_of_" + *against] = line.value("seconds_p50", 0.0) / reference_seconds;
      }
      console.out << line.dump() << std::endl;
    }
  }
  return absl::OkStatus();
}

}  // namespace keepset::cli
