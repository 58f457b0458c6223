// How long operations take while the active table changes, against how long they take otherwise: a
// keepsetd process under load, its tables in a directory and in etcd. Prints one line of JSON for
// each; exits 1 when an operation failed or an answer was not whole.
//
//   registry_swap_bench KEEPSETD [--streams=32] [--swaps=200] [--operations-per-swap=64]
//                       [--quiet-operations=12800] [--source=directory|etcd]
#include <signal.h>

#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "service/registry/etcd/etcd_layout.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/child_process.h"
#include "tests/integration/etcd_server.h"
#include "tests/integration/swap_load.h"

namespace keepset::integration {
namespace {

struct Arguments {
  std::string keepsetd;
  std::string source;  // empty: both
  SwapLoadOptions load;
};

bool Parse(int argc, char** argv, Arguments& arguments) {
  for (int i = 1; i < argc; ++i) {
    absl::string_view text = argv[i];
    bool ok = true;
    if (absl::ConsumePrefix(&text, "--streams=")) {
      ok = absl::SimpleAtoi(text, &arguments.load.num_streams);
    } else if (absl::ConsumePrefix(&text, "--swaps=")) {
      ok = absl::SimpleAtoi(text, &arguments.load.num_swaps);
    } else if (absl::ConsumePrefix(&text, "--operations-per-swap=")) {
      ok = absl::SimpleAtoi(text, &arguments.load.operations_per_swap);
    } else if (absl::ConsumePrefix(&text, "--quiet-operations=")) {
      ok = absl::SimpleAtoi(text, &arguments.load.quiet_operations);
    } else if (absl::ConsumePrefix(&text, "--source=")) {
      arguments.source = std::string(text);
    } else if (arguments.keepsetd.empty() && !absl::StartsWith(text, "--")) {
      arguments.keepsetd = std::string(text);
    } else {
      ok = false;
    }
    if (!ok) {
      std::fprintf(stderr, "registry_swap_bench: \"%s\" is not understood\n", argv[i]);
      return false;
    }
  }
  return !arguments.keepsetd.empty();
}

// keepsetd with its log read away.
class RunningServer {
 public:
  explicit RunningServer(const std::vector<std::string>& arguments)
      : process_(arguments, ChildProcess::Output::kStderr) {
    is_ready_ = !process_.AwaitLine("ready").empty();
    reader_ = std::thread([this] {
      while (!process_.AwaitLine("stopped").empty()) {
      }
    });
  }
  ~RunningServer() {
    process_.Signal(SIGKILL);
    reader_.join();
  }
  bool is_ready() const { return is_ready_; }

 private:
  ChildProcess process_;
  bool is_ready_ = false;
  std::thread reader_;
};

int Run(const Arguments& arguments, const std::string& source) {
  const fakes::SyntheticPrompt prompt({.num_layers = 2});
  const std::vector<AnsweringTable> tables = SwapLoadTables(prompt);
  const fakes::ScratchDirectory directory;
  SwapLoadOptions load = arguments.load;
  load.address = absl::StrCat("unix:", directory / "k.sock");
  std::vector<std::string> command = {
      arguments.keepsetd, "--listen", load.address,       "--metrics-listen", "off",
      "--table-writes",   "--state",  directory / "state"};
  EtcdServer etcd;
  if (source == "etcd") {
    if (!etcd.Start()) return 1;
    const service::etcd::Layout layout("/keepset");
    for (const AnsweringTable& table : tables) {
      etcd.Put(layout.TableKey(table.name, table.version), table.file);
    }
    service::LineAssignment line;
    line.mode = service::LineMode::kChosen;
    line.active = service::TableTarget{tables[0].version, tables[0].digest};
    etcd.Put(layout.LineKey(tables[0].name), service::etcd::SerializeLine(line));
    command.insert(command.end(), {"--etcd", etcd.endpoint()});
  } else {
    for (const AnsweringTable& table : tables) {
      fakes::WriteInPlace(directory / absl::StrCat(table.version, ".safetensors"), table.file);
    }
    command.insert(command.end(), {"--tables", directory.path()});
  }
  const RunningServer server(command);
  if (!server.is_ready()) {
    std::fprintf(stderr, "registry_swap_bench: %s did not start\n", arguments.keepsetd.c_str());
    return 1;
  }
  const absl::StatusOr<SwapLoadReport> report = RunSwapLoad(load, prompt, tables);
  if (!report.ok()) {
    std::fprintf(stderr, "registry_swap_bench: %s\n", report.status().ToString().c_str());
    return 1;
  }
  const auto ms = [](absl::Duration d) { return absl::ToDoubleMilliseconds(d); };
  std::printf(
      "{\"source\": \"%s\", \"streams\": %d, \"activations\": %lld, \"rollbacks\": %lld, "
      "\"failed\": %lld, \"mixed\": %lld, "
      "\"quiet\": {\"operations\": %lld, \"p50_ms\": %.3f, \"p99_ms\": %.3f}, "
      "\"swapping\": {\"operations\": %lld, \"p50_ms\": %.3f, \"p99_ms\": %.3f}, "
      "\"p99_swapping_over_quiet\": %.3f, \"swap_p50_ms\": %.3f, \"swap_p99_ms\": %.3f, "
      "\"processors\": %u}\n",
      source.c_str(), load.num_streams, static_cast<long long>(report->activations),
      static_cast<long long>(report->rollbacks), static_cast<long long>(report->failed),
      static_cast<long long>(report->mixed), static_cast<long long>(report->quiet.operations),
      ms(report->quiet.p50), ms(report->quiet.p99),
      static_cast<long long>(report->swapping.operations), ms(report->swapping.p50),
      ms(report->swapping.p99), absl::FDivDuration(report->swapping.p99, report->quiet.p99),
      ms(report->swap_p50), ms(report->swap_p99), std::thread::hardware_concurrency());
  std::fflush(stdout);
  if (report->failed == 0 && report->mixed == 0) return 0;
  std::fprintf(stderr, "registry_swap_bench: %s\n", report->first_complaint.c_str());
  return 1;
}

}  // namespace
}  // namespace keepset::integration

int main(int argc, char** argv) {
  keepset::integration::Arguments arguments;
  if (!keepset::integration::Parse(argc, argv, arguments)) return 2;
  int result = 0;
  for (const char* source : {"directory", "etcd"}) {
    if (!arguments.source.empty() && arguments.source != source) continue;
    result |= keepset::integration::Run(arguments, source);
  }
  return result;
}
