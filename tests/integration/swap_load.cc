#include "tests/integration/swap_load.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "clients/cpp/table_client.h"
#include "tests/integration/typed_worker.h"

namespace keepset::integration {
namespace {

constexpr int64_t kBudget = 40;
constexpr int kVersions = 8;
// Every so many swaps one is a rollback.
constexpr int kRollbackEvery = 4;
constexpr absl::string_view kLine = "live";
// Long: only a server that hangs is waited for so long.
constexpr absl::Duration kProgressDeadline = absl::Seconds(120);

enum class Phase { kQuiet, kSwapping };

absl::Duration Percentile(std::vector<absl::Duration>& sorted, double share) {
  if (sorted.empty()) return absl::ZeroDuration();
  const auto rank = static_cast<size_t>(share * static_cast<double>(sorted.size() - 1));
  return sorted[rank];
}

LatencyStats StatsOf(std::vector<absl::Duration> latencies) {
  std::sort(latencies.begin(), latencies.end());
  return {.operations = static_cast<int64_t>(latencies.size()),
          .p50 = Percentile(latencies, 0.50),
          .p99 = Percentile(latencies, 0.99)};
}

// The streams. They begin with the object and end with Stop.
class Workers {
 public:
  Workers(const SwapLoadOptions& options, const fakes::SyntheticPrompt& prompt,
          const TablesByDigest& tables)
      : prompt_(prompt), tables_(tables), layers_(TypedLayers(prompt)) {
    for (int i = 0; i < options.num_streams; ++i) {
      threads_.emplace_back([this, address = options.address] { Run(address); });
    }
  }
  ~Workers() { Stop(); }

  void Stop() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void Enter(Phase phase) { phase_ = phase; }

  // Waits until `count` more operations have been answered.
  absl::Status Await(int64_t count) {
    absl::MutexLock lock(&mutex_);
    const int64_t target = done_ + count;
    const auto reached = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return done_ >= target; };
    if (mutex_.AwaitWithTimeout(absl::Condition(&reached), kProgressDeadline)) {
      return absl::OkStatus();
    }
    return absl::DeadlineExceededError(
        absl::StrCat("operations stopped: ", findings_.first_complaint()));
  }

  const Findings& findings() const { return findings_; }
  std::vector<absl::Duration> latencies(Phase phase) {
    absl::MutexLock lock(&mutex_);
    return latencies_[static_cast<int>(phase)];
  }

 private:
  void Run(const std::string& address) {
    const auto client = ConnectTo(address, client::Transport::kInline);
    if (client == nullptr) return;
    const auto stream = client->OpenStream();
    if (!stream.ok()) {
      findings_.Add(stream.status(), tables_, "");
      return;
    }
    client::OperationSpec spec = TypedSpec(prompt_, "compilerkv", kBudget);
    spec.table.name = std::string(kLine);
    while (!stop_) {
      const Phase phase = phase_;
      const absl::Duration begin = SystemClock().Monotonic();
      const absl::StatusOr<client::OperationResult> result = RunOnce(**stream, spec, layers_);
      const absl::Duration took = SystemClock().Monotonic() - begin;
      findings_.Add(result, tables_, "");
      absl::MutexLock lock(&mutex_);
      ++done_;
      // An operation that saw the phase change belongs to neither.
      if (phase == phase_) latencies_[static_cast<int>(phase)].push_back(took);
    }
  }

  const fakes::SyntheticPrompt& prompt_;
  const TablesByDigest& tables_;
  const std::vector<client::LayerInput> layers_;
  std::atomic<bool> stop_ = false;
  std::atomic<Phase> phase_ = Phase::kQuiet;
  Findings findings_;
  absl::Mutex mutex_;
  int64_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<absl::Duration> latencies_[2] ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

// Activates the versions in turn; every kRollbackEvery-th swap goes back instead.
class Swapper {
 public:
  Swapper(client::TableClient& client, const std::vector<AnsweringTable>& tables)
      : client_(client), tables_(tables) {}

  absl::Status Swap(int number, SwapLoadReport& report) {
    const bool goes_back = number % kRollbackEvery == kRollbackEvery - 1;
    const absl::Duration begin = SystemClock().Monotonic();
    if (goes_back) {
      KEEPSET_RETURN_IF_ERROR(client_.Rollback(std::string(kLine), {.actor = "load"}).status());
      ++report.rollbacks;
    } else {
      next_ = (next_ + 1) % tables_.size();
      client::TableRef table;
      table.name = std::string(kLine);
      table.version = tables_[next_].version;
      KEEPSET_RETURN_IF_ERROR(client_.Activate(table, "", {.actor = "load"}).status());
      ++report.activations;
    }
    took_.push_back(SystemClock().Monotonic() - begin);
    return absl::OkStatus();
  }

  const std::vector<absl::Duration>& took() const { return took_; }

 private:
  client::TableClient& client_;
  const std::vector<AnsweringTable>& tables_;
  size_t next_ = 0;
  std::vector<absl::Duration> took_;
};

}  // namespace

std::vector<AnsweringTable> SwapLoadTables(const fakes::SyntheticPrompt& prompt) {
  std::vector<AnsweringTable> tables;
  for (int i = 0; i < kVersions; ++i) {
    tables.push_back(MakeAnsweringTable(prompt, std::string(kLine), absl::StrCat("v", i),
                                        0.80f + 0.02f * static_cast<float>(i), kBudget));
  }
  return tables;
}

absl::StatusOr<SwapLoadReport> RunSwapLoad(const SwapLoadOptions& options,
                                           const fakes::SyntheticPrompt& prompt,
                                           const std::vector<AnsweringTable>& tables) {
  TablesByDigest by_digest;
  for (const AnsweringTable& table : tables) by_digest[table.digest] = table;
  client::ClientOptions client_options;
  client_options.address = options.address;
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<client::TableClient> client,
                           client::TableClient::New(client_options));
  SwapLoadReport report;
  Swapper swapper(*client, tables);
  Workers workers(options, prompt, by_digest);
  // What connecting cost is nobody's latency: the first answers of every stream are not counted.
  workers.Enter(Phase::kSwapping);
  KEEPSET_RETURN_IF_ERROR(workers.Await(4 * options.num_streams));
  workers.Enter(Phase::kQuiet);
  const size_t warm_up = workers.latencies(Phase::kSwapping).size();
  KEEPSET_RETURN_IF_ERROR(workers.Await(options.quiet_operations / 2));
  workers.Enter(Phase::kSwapping);
  for (int i = 0; i < options.num_swaps; ++i) {
    KEEPSET_RETURN_IF_ERROR(swapper.Swap(i, report));
    KEEPSET_RETURN_IF_ERROR(workers.Await(options.operations_per_swap));
  }
  workers.Enter(Phase::kQuiet);
  KEEPSET_RETURN_IF_ERROR(workers.Await(options.quiet_operations / 2));
  workers.Stop();
  report.failed = workers.findings().failed();
  report.mixed = workers.findings().mixed();
  report.first_complaint = workers.findings().first_complaint();
  report.quiet = StatsOf(workers.latencies(Phase::kQuiet));
  std::vector<absl::Duration> swapping = workers.latencies(Phase::kSwapping);
  swapping.erase(swapping.begin(), swapping.begin() + static_cast<int64_t>(warm_up));
  report.swapping = StatsOf(std::move(swapping));
  const LatencyStats swap = StatsOf(swapper.took());
  report.swap_p50 = swap.p50;
  report.swap_p99 = swap.p99;
  return report;
}

}  // namespace keepset::integration
