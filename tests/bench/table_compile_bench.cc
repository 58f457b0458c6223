// Time and memory of a table compilation: writes calibration records to a temporary file, compiles
// them, prints one line of JSON.
//
//   table_compile_bench [RECORDS [THREADS]]     default 200000 records, all cores
//
// Half of the records are heads', half gates', for 32 layers of 32 query heads at one budget; the
// text of a line is what a rollout in Python writes.
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tables/table_compiler.h"

namespace keepset::tables {
namespace {

constexpr int kNumLayers = 32;
constexpr int kNumHeads = 32;

using SteadyClock = std::chrono::steady_clock;

double SecondsSince(SteadyClock::time_point begin) {
  return std::chrono::duration<double>(SteadyClock::now() - begin).count();
}

bool WriteRecords(const std::string& path, int64_t count) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (file == nullptr) return false;
  std::mt19937_64 random(1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t turn = i / 2;
    const double noise = static_cast<double>(random() >> 11) * 0x1p-53;
    const auto layer = static_cast<int>(turn % kNumLayers);
    if (i % 2 == 0) {
      std::fprintf(file,
                   "{\"kind\": \"head\", \"prompt_id\": \"prompt-%06d\", \"seed\": %d, \"layer\": "
                   "%d, \"head\": %d, \"budget\": 512, \"action\": %.3f, \"full_loss\": "
                   "2.0416781902313232, \"compressed_loss\": %.16f, \"sequence_length\": 32768, "
                   "\"paired_policy\": \"gates-0001\"}\n",
                   static_cast<int>(turn % 50000), static_cast<int>(turn), layer,
                   static_cast<int>(turn / kNumLayers % kNumHeads),
                   0.8 + 0.025 * static_cast<int>(turn / kNumLayers / kNumHeads % 29),
                   2.1 + 0.1 * noise);
    } else {
      std::fprintf(file,
                   "{\"kind\": \"gate\", \"prompt_id\": \"prompt-%06d\", \"seed\": %d, \"layer\": "
                   "%d, \"budget\": 512, \"action\": %.2f, \"full_loss\": 2.0416781902313232, "
                   "\"compressed_loss\": %.16f, \"sequence_length\": 32768, \"entropy\": %.16f, "
                   "\"ppl\": %.15f, \"candidate_count\": %d, \"paired_policy\": \"heads-0001\"}\n",
                   static_cast<int>(turn % 50000), static_cast<int>(turn), layer,
                   0.8 + 0.01 * static_cast<int>(turn / kNumLayers % 21), 2.1 + 0.1 * noise,
                   3 + 6 * noise, 1 + static_cast<double>(random() % 1000000) / 20000,
                   400 + static_cast<int>(random() % 400));
    }
  }
  return std::fclose(file) == 0;
}

int Run(int64_t count, int num_threads) {
  const std::string path = (std::filesystem::temp_directory_path() /
                            absl::StrCat("table_compile_bench.", getpid(), ".jsonl"))
                               .string();
  CompileOptions options;
  options.name = "bench";
  options.version = "1";
  options.model.architecture = "bench";
  options.model.num_layers = kNumLayers;
  options.model.num_qo_heads = kNumHeads;
  options.model.num_kv_heads = 8;
  options.model.head_dim = 128;
  options.num_threads = num_threads;
  const bool written = WriteRecords(path, count);
  absl::StatusOr<CompiledTable> table = absl::InternalError("the records cannot be written");
  double bytes = 0;
  double seconds = 0;
  if (written) {
    bytes = static_cast<double>(std::filesystem::file_size(path));
    const SteadyClock::time_point begin = SteadyClock::now();
    table = CompileTable({path}, options, nullptr);
    seconds = SecondsSince(begin);
  }
  std::filesystem::remove(path);
  if (!table.ok()) {
    std::fprintf(stderr, "%s\n", std::string(table.status().message()).c_str());
    return 1;
  }
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  std::printf(
      "{\"records\": %lld, \"threads\": %d, \"bytes\": %.0f, \"seconds\": %.3f, "
      "\"records_per_second\": %.0f, \"peak_rss_mib\": %.0f}\n",
      static_cast<long long>(count), num_threads, bytes, seconds,
      static_cast<double>(count) / seconds, static_cast<double>(usage.ru_maxrss) / 1024);
  return 0;
}

}  // namespace
}  // namespace keepset::tables

int main(int argc, char** argv) {
  int64_t count = 200000;
  int num_threads = 0;
  if ((argc > 1 && (!absl::SimpleAtoi(argv[1], &count) || count < 2)) ||
      (argc > 2 && (!absl::SimpleAtoi(argv[2], &num_threads) || num_threads < 0)) || argc > 3) {
    std::fprintf(stderr, "usage: table_compile_bench [RECORDS [THREADS]]\n");
    return 2;
  }
  return keepset::tables::Run(count, num_threads);
}
