#include "tests/gpu/targets.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace keepset::gpu {
namespace {

using Json = nlohmann::json;

constexpr int kExitUsage = 2;
constexpr int64_t kLengths[] = {1024, 4096, 32768, 131072};

enum class Goal {
  kAtMost,
  kAtLeast,
  kStated,     // the figure is to be stated, whatever it is
  kElsewhere,  // no run of this program has it
};
enum class Values {
  kPositive,  // zero or less is no figure but a mistake
  kAny,
};

struct Target {
  std::string name;
  Goal goal = Goal::kStated;
  double limit = 0.0;
  std::string unit;
  Json line;          // fields of the lines that it is about
  std::string field;  // of such a line
  Values values = Values::kPositive;
  std::string except_path;     // lines of this `path` are no figure of it; empty: all are
  std::string device;          // part of the name of the device that it is for; empty: any
  bool needs_gemm = false;     // a ratio to a floor of which the GEMM ceiling is a part
  std::string goal_elsewhere;  // kElsewhere
  std::string why_elsewhere;
};

bool Matches(const Json& line, const Json& wanted) {
  return std::all_of(wanted.items().begin(), wanted.items().end(), [&](const auto& field) {
    const auto found = line.find(field.key());
    return found != line.end() && *found == field.value();
  });
}

std::optional<double> Figure(const Json& line, const Target& target) {
  const auto value = line.find(target.field);
  if (value == line.end() || !value->is_number()) return std::nullopt;
  const double figure = value->get<double>();
  if (!std::isfinite(figure)) return std::nullopt;
  if (target.values == Values::kPositive && figure <= 0.0) return std::nullopt;
  return figure;
}

std::string TextOf(const Json& line, const char* field) {
  const auto found = line.find(field);
  return found != line.end() && found->is_string() ? found->get<std::string>() : "";
}

bool RunsOn(absl::Span<const Json> lines, const std::string& device) {
  return std::any_of(lines.begin(), lines.end(), [&](const Json& line) {
    return TextOf(line, "bench") == "device" && absl::StrContains(TextOf(line, "name"), device);
  });
}

std::string GoalText(const Target& target) {
  const std::string on = target.device.empty() ? "" : absl::StrCat(" on an ", target.device);
  switch (target.goal) {
    case Goal::kAtMost:
      return absl::StrFormat("<= %g%s%s", target.limit, target.unit, on);
    case Goal::kAtLeast:
      return absl::StrFormat(">= %g%s%s", target.limit, target.unit, on);
    case Goal::kElsewhere:
      return target.goal_elsewhere;
    case Goal::kStated:
      break;
  }
  return "stated";
}

Verdict NotMeasured(const Target& target, const std::string& why) {
  return {target.name, GoalText(target), std::nullopt, kNotMeasured, why};
}

// Whether the line may be about what is wanted, as far as it says.
bool MayMatch(const Json& line, const Json& wanted) {
  bool has_any = false;
  for (const auto& [key, value] : wanted.items()) {
    const auto found = line.find(key);
    if (found == line.end()) continue;
    if (*found != value) return false;
    has_any = true;
  }
  return has_any;
}

// Why no line of the run has the figure.
std::string WhyNot(absl::Span<const Json> lines, const Target& target) {
  std::string why = "the run has no such line";
  for (const Json& line : lines) {
    if (Matches(line, target.line)) why = absl::StrCat("the run has no usable ", target.field);
    if (!MayMatch(line, target.line)) continue;
    for (const char* const reason : {"skipped", "error"}) {
      if (!TextOf(line, reason).empty()) return TextOf(line, reason);
    }
  }
  return why;
}

Verdict Judge(absl::Span<const Json> lines, const Target& target) {
  if (target.goal == Goal::kElsewhere) return NotMeasured(target, target.why_elsewhere);
  if (!target.device.empty() && !RunsOn(lines, target.device)) {
    return NotMeasured(target, absl::StrCat("the device is no ", target.device));
  }
  std::optional<double> worst;
  bool lacks_gemm = false;
  for (const Json& line : lines) {
    if (!Matches(line, target.line)) continue;
    if (!target.except_path.empty() && TextOf(line, "path") == target.except_path) continue;
    const std::optional<double> figure = Figure(line, target);
    if (!figure.has_value()) continue;
    const bool is_worse =
        !worst.has_value() || (target.goal == Goal::kAtLeast ? *figure < *worst : *figure > *worst);
    if (is_worse) worst = figure;
    const auto has_gemm = line.find("floor_has_gemm");
    lacks_gemm = lacks_gemm || has_gemm == line.end() || *has_gemm != true;
  }
  if (!worst.has_value()) return NotMeasured(target, WhyNot(lines, target));
  Verdict verdict = {target.name, GoalText(target), worst, kMeasured, ""};
  if (target.goal == Goal::kStated) return verdict;
  const bool is_reached =
      target.goal == Goal::kAtMost ? *worst <= target.limit : *worst >= target.limit;
  verdict.verdict = is_reached ? kReached : kNotReached;
  if (target.needs_gemm && lacks_gemm) {
    // The floor is the higher of three; without one of them it may be too low, never too high.
    if (!is_reached) return NotMeasured(target, "the floor lacks the GEMM ceiling: no cuBLAS");
    verdict.note = "against a floor without the GEMM ceiling";
  }
  return verdict;
}

Target Stated(std::string name, Json line, std::string field) {
  Target target;
  target.name = std::move(name);
  target.line = std::move(line);
  target.field = std::move(field);
  return target;
}

Target AtMost(std::string name, double limit, std::string unit, Json line, std::string field) {
  Target target = Stated(std::move(name), std::move(line), std::move(field));
  target.goal = Goal::kAtMost;
  target.limit = limit;
  target.unit = std::move(unit);
  return target;
}

Target AtLeast(std::string name, double limit, std::string unit, Json line, std::string field) {
  Target target =
      AtMost(std::move(name), limit, std::move(unit), std::move(line), std::move(field));
  target.goal = Goal::kAtLeast;
  return target;
}

// Zero and less are figures, too.
Target OfAnyValue(Target target) {
  target.values = Values::kAny;
  return target;
}

Target Elsewhere(std::string name, std::string goal, const std::string& page) {
  Target target = Stated(std::move(name), Json(), "");
  target.goal_elsewhere = std::move(goal);
  target.goal = Goal::kElsewhere;
  target.why_elsewhere = absl::StrCat("by this run: ", page);
  return target;
}

Json WindowLine(const char* path, int64_t seq_len, bool has_lse, bool is_paged) {
  return {{"bench", "window_scores"}, {"path", path},    {"seq_len", seq_len},
          {"head_dim", 128},          {"rows", 64},      {"window_lse", has_lse},
          {"paged", is_paged},        {"one_call", true}};
}

void AddWindowScores(std::vector<Target>* targets) {
  const auto add = [&](const std::string& name, const Json& line, const char* field, double limit) {
    Target target = AtMost(name, limit, "x", line, field);
    target.needs_gemm = true;
    targets->push_back(std::move(target));
  };
  for (const int64_t seq_len : kLengths) {
    for (const bool is_paged : {false, true}) {
      const std::string where = absl::StrCat("T ", seq_len, is_paged ? ", paged" : ", contiguous");
      add(absl::StrCat("portable to two-pass floor, ", where),
          WindowLine("portable", seq_len, false, is_paged), "ratio_to_two_pass", 3.0);
      add(absl::StrCat("portable with window_lse to two-pass floor, ", where),
          WindowLine("portable", seq_len, true, is_paged), "ratio_to_two_pass", 3.0);
      add(absl::StrCat("Hopper to two-pass floor, ", where),
          WindowLine("hopper", seq_len, false, is_paged), "ratio_to_two_pass", 1.4);
      add(absl::StrCat("Hopper with window_lse to one-pass floor, ", where),
          WindowLine("hopper", seq_len, true, is_paged), "ratio_to_one_pass", 1.35);
    }
  }
  // Milliseconds hold for the card that they were derived for.
  const auto add_absolute = [&](const char* name, const char* path, bool has_lse, double limit) {
    Target target =
        AtMost(name, limit, " ms", WindowLine(path, 32768, has_lse, false), "device_ms");
    target.device = "H200";
    targets->push_back(std::move(target));
  };
  add_absolute("portable, T 32768", "portable", false, 4.2);
  add_absolute("Hopper, T 32768", "hopper", false, 1.95);
  add_absolute("Hopper with window_lse, T 32768", "hopper", true, 1.35);
}

// What the operations do beside being fast.
void AddConduct(std::vector<Target>* targets) {
  const Json windows = {{"bench", "window_scores"}};
  targets->push_back(OfAnyValue(AtMost("device memory that warm window scores allocate", 0.0,
                                       " bytes", windows, "allocated_bytes")));
  // A wait inside would make it 0; a host that was held up takes a little off.
  Target ahead = OfAnyValue(AtLeast("window scores queued before the device begins", 0.9, " of all",
                                    windows, "host_ahead"));
  // More launches than a stream holds: there the host waits for room.
  ahead.except_path = "cublas";
  targets->push_back(std::move(ahead));
  for (const char* const check : {"tests", "ipc"}) {
    const Json line = {{"check", check}};
    targets->push_back(OfAnyValue(AtMost(
        absl::StrCat("correctness on the card: exit code of ", check), 0.0, "", line, "exit")));
  }
}

void AddPeers(std::vector<Target>* targets) {
  // In the tree: our kernels around cuBLAS' products.
  for (const int64_t seq_len : kLengths) {
    for (const bool has_lse : {false, true}) {
      for (const bool is_paged : {false, true}) {
        const std::string name = absl::StrCat("peer with cuBLAS", has_lse ? " and window_lse" : "",
                                              is_paged ? ", paged" : "", ", ms, T ", seq_len);
        targets->push_back(
            Stated(name, WindowLine("cublas", seq_len, has_lse, is_paged), "device_ms"));
      }
    }
  }
  for (const int64_t seq_len : kLengths) {
    for (const char* const peer : {"repeat_kv", "grouped", "grouped_compiled"}) {
      // The first is what our device_ms is to be compared with, the second holds pooling, selection
      // and gathering, too.
      const Json line = {{"peer", peer}, {"seq_len", seq_len}};
      targets->push_back(Stated(
          absl::StrCat("peer ", peer, ", window attention without value norms, ms, T ", seq_len),
          line, "scores_ms"));
      targets->push_back(
          Stated(absl::StrCat("peer ", peer, ", from attention to kept rows, ms, T ", seq_len),
                 line, "ms"));
    }
  }
  const Json line = {{"peer", "torch.topk"}, {"rows", 32}, {"length", 32768}, {"k", 512}};
  targets->push_back(Stated("peer torch.topk, us, 32 x 32768, k 512", line, "us"));
}

void AddService(std::vector<Target>* targets) {
  for (const int64_t seq_len : {1024, 32768}) {
    const Json line = {{"bench", "service"}, {"seq_len", seq_len}};
    targets->push_back(OfAnyValue(AtMost(absl::StrCat("service adds to in-process, T ", seq_len),
                                         150.0, " us", line, "added_us_p50")));
  }
  const Json heads = {
      {"bench", "observation_heads"}, {"against", "snapkv"}, {"heads", 16}, {"seq_len", 32768}};
  targets->push_back(
      AtMost("observation_heads, 16 heads, to snapkv, T 32768", 0.1, "x", heads, "share"));
  for (const char* const mode : {"alone", "in_process", "second_process"}) {
    const Json line = {{"bench", "interference"}, {"mode", mode}};
    for (const char* const field : {"step_ms_p50", "step_ms_p99"}) {
      targets->push_back(Stated(absl::StrCat("interference, ", mode, ", ", field), line, field));
    }
  }
}

std::vector<Target> AllTargets() {
  const Json ceilings = {{"bench", "ceilings"}};
  std::vector<Target> targets = {
      Stated("ceiling: device copy, GB/s", ceilings, "copy_gb_per_s"),
      Stated("ceiling: bf16 GEMM of 8192 cubed, TFLOP/s", ceilings, "gemm_tflops"),
      Stated("ceiling: exp2 per ns", ceilings, "exp2_per_ns")};
  AddWindowScores(&targets);
  const Json select = {{"bench", "select"}, {"rows", 32}, {"length", 32768}, {"budget", 512}};
  targets.push_back(AtMost("selection 32 x 32768, k 512", 25.0, " us", select, "device_us"));
  const Json gather = {{"bench", "gather"}, {"layers", 32}, {"seq_len", 32768}, {"budget", 512}};
  targets.push_back(
      AtLeast("gather of 32 layers, 512 of 32768, to copy", 0.75, "x", gather, "share_of_copy"));
  AddConduct(&targets);
  AddService(&targets);
  AddPeers(&targets);
  const std::string cpu = "docs/results/cpu.md";
  targets.push_back(Elsewhere("CPU: share of the multiply-add peak in the logits", ">= 85 %", cpu));
  targets.push_back(Elsewhere("CPU: time to the PyTorch path", "several times faster", cpu));
  targets.push_back(Elsewhere("reload of a table under load", "0 failed or mixed, p99 unchanged",
                              "docs/results/registry.md"));
  return targets;
}

void Print(const Verdict& verdict) {
  nlohmann::ordered_json line = {{"target", verdict.target}, {"goal", verdict.goal}};
  line["measured"] = verdict.measured.has_value() ? nlohmann::ordered_json(*verdict.measured)
                                                  : nlohmann::ordered_json(nullptr);
  line["verdict"] = std::string(verdict.verdict);
  if (!verdict.note.empty()) line["note"] = verdict.note;
  std::printf("%s\n", line.dump().c_str());
  const std::string measured =
      verdict.measured.has_value() ? absl::StrFormat("%.4g", *verdict.measured) : "-";
  absl::FPrintF(stderr, "%-16s  %-66s  %-32s  %10s  %s\n", verdict.verdict, verdict.target,
                verdict.goal, measured, verdict.note);
}

}  // namespace

std::vector<Verdict> JudgeTargets(absl::Span<const Json> lines) {
  std::vector<Verdict> verdicts;
  for (const Target& target : AllTargets()) verdicts.push_back(Judge(lines, target));
  return verdicts;
}

int RunTargets(absl::Span<const char* const> arguments) {
  if (arguments.size() != 1) {
    std::fprintf(stderr, "usage: gpu_bench targets DIRECTORY\n");
    return kExitUsage;
  }
  std::vector<Json> lines;
  for (const char* const name : {"bench.jsonl", "service.jsonl", "peers.jsonl", "checks.jsonl"}) {
    std::ifstream file(absl::StrCat(arguments.front(), "/", name));
    for (std::string text; std::getline(file, text);) {
      Json line = Json::parse(text, nullptr, /*allow_exceptions=*/false);
      if (line.is_object()) lines.push_back(std::move(line));
    }
  }
  absl::FPrintF(stderr, "%-16s  %-66s  %-32s  %10s  %s\n", "verdict", "target", "goal", "measured",
                "note");
  for (const Verdict& verdict : JudgeTargets(lines)) Print(verdict);
  return 0;
}

}  // namespace keepset::gpu
