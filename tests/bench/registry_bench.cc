// Start of a registry of 100 models x 5 versions, and what it holds in memory. One JSON line per
// way to start, each in a process of its own: `directory` without a state directory (tables in
// memory), `directory_first` and `directory_again` with one (copied, then found there), `recover`
// from the state directory alone. Usage: registry_bench [MODELS VERSIONS].
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/clock.h"
#include "service/registry/state_directory.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"
#include "service/registry/table_source.h"
#include "tables/safetensors.h"
#include "tables/table_file.h"

namespace keepset::service {
namespace {

constexpr int64_t kKibi = 1024;

// The size of a table for a model of 32 layers and 32 heads with 8 budgets, 12 x 4 risk bins.
std::string TableFile(int model, int version) {
  tables::ModelFingerprint fingerprint;
  fingerprint.architecture = absl::StrCat("Model", model);
  fingerprint.num_layers = 32;
  fingerprint.num_qo_heads = 32;
  fingerprint.num_kv_heads = 8;
  fingerprint.head_dim = 128;
  tables::CompilerKvTableContent content = tables::UniformTable(fingerprint, 1.0f, 0.9f);
  content.name = absl::StrCat("model-", model);
  content.version = absl::StrCat(version);
  for (int i = 0; i < 8; ++i) content.budgets.push_back(128 << i);
  for (int i = 0; i < 11; ++i) content.entropy_edges.push_back(static_cast<float>(i));
  for (int i = 0; i < 3; ++i) content.ppl_edges.push_back(static_cast<float>(10 * i));
  content.head_weights.assign(8 * 32 * 32, 1.0f);
  content.gate_thresholds.assign(8 * 32 * 12 * 4, 0.9f);
  return *tables::SerializeTable(content);
}

// A line of /proc/self/status in bytes.
int64_t StatusBytes(absl::string_view key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(std::string(key) + ":", 0) != 0) continue;
    const std::vector<std::string> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
    int64_t kibibytes = 0;
    KEEPSET_CHECK(absl::SimpleAtoi(words.at(1), &kibibytes));
    return kibibytes * kKibi;
  }
  return 0;
}

struct Paths {
  std::string tables;
  std::string state;  // empty: none
};

void MeasureStart(const std::string& mode, const Paths& paths) {
  const int64_t anonymous_before = StatusBytes("RssAnon");
  const int64_t file_before = StatusBytes("RssFile");
  const Clock& clock = SystemClock();
  const absl::Duration start = clock.Monotonic();
  std::unique_ptr<StateDirectory> state;
  if (!paths.state.empty()) state = *StateDirectory::Open(paths.state);
  const auto loader = state == nullptr ? NewTableLoader() : NewMappingTableLoader(*state);
  tables::TableStore store;
  TableRegistryOptions options;
  options.store = &store;
  options.clock = &clock;
  options.state = state.get();
  options.sources = {"directory"};
  const auto registry = *TableRegistry::New(options);
  std::unique_ptr<TableSource> source;
  if (!paths.tables.empty()) {
    TableSourceOptions source_options;
    source_options.directory.directory = paths.tables;
    source = NewDirectorySource(source_options,
                                {.registry = *registry, .loader = *loader, .clock = clock});
    KEEPSET_CHECK(source->Start().ok());
  }
  const absl::Duration took = clock.Monotonic() - start;
  int64_t table_bytes = 0;
  const auto snapshot = store.Snapshot();
  for (const TablePtr& table : snapshot->loaded) {
    table_bytes += static_cast<int64_t>(table->file_bytes().size());
  }
  absl::PrintF(
      "{\"start\": \"%s\", \"active\": %d, \"loaded\": %d, \"table_bytes\": %d, \"seconds\": %.3f, "
      "\"resident_anonymous_bytes\": %d, \"resident_file_bytes\": %d}\n",
      mode, store.Snapshot()->tables.size(), store.Snapshot()->loaded.size(), table_bytes,
      absl::ToDoubleSeconds(took), StatusBytes("RssAnon") - anonymous_before,
      StatusBytes("RssFile") - file_before);
  std::fflush(stdout);
}

void InAProcess(const std::function<void()>& work) {
  const pid_t child = fork();
  KEEPSET_CHECK(child >= 0);
  if (child == 0) {
    work();
    std::_Exit(0);
  }
  int status = 0;
  KEEPSET_CHECK(waitpid(child, &status, 0) == child && status == 0);
}

int Main(int models, int versions) {
  std::string root = (std::filesystem::temp_directory_path() / "registry_bench_XXXXXX").string();
  KEEPSET_CHECK(mkdtemp(root.data()) != nullptr);
  const std::string tables = root + "/tables";
  std::filesystem::create_directory(tables);
  InAProcess([&] {
    for (int model = 0; model < models; ++model) {
      for (int version = 1; version <= versions; ++version) {
        const std::string path =
            absl::StrCat(tables, "/model-", model, "-", version, ".safetensors");
        KEEPSET_CHECK(tables::ReplaceFile(path, TableFile(model, version)).ok());
      }
    }
  });
  // A file that has just been written is looked at twice; these are old.
  sleep(1);
  InAProcess([&] { MeasureStart("directory", {tables, ""}); });
  InAProcess([&] { MeasureStart("directory_first", {tables, root + "/state"}); });
  InAProcess([&] { MeasureStart("directory_again", {tables, root + "/state"}); });
  InAProcess([&] { MeasureStart("recover", {"", root + "/state"}); });
  std::filesystem::remove_all(root);
  return 0;
}

}  // namespace
}  // namespace keepset::service

int main(int argc, char** argv) {
  int models = 100;
  int versions = 5;
  if (argc == 3 && (!absl::SimpleAtoi(argv[1], &models) || !absl::SimpleAtoi(argv[2], &versions))) {
    std::fputs("usage: registry_bench [MODELS VERSIONS]\n", stderr);
    return 2;
  }
  return keepset::service::Main(models, versions);
}
