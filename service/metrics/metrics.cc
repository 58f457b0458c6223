#include "service/metrics/metrics.h"

#include <array>
#include <cstddef>
#include <iterator>
#include <set>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"
#include "service/metrics/families.h"
#include "service/metrics/metric_names.h"
#include "service/metrics/metrics_endpoint.h"
#include "service/metrics/table_series.h"

namespace keepset::service {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

static_assert(std::size(kShadowValues) == static_cast<size_t>(ShadowSample::Result::kFailed) + 1);
static_assert(std::size(kStageValues) == kNumStages);
static_assert(std::size(kRejectValues) == static_cast<size_t>(Reject::kFence) + 1);

class PrometheusMetrics : public Metrics {
 public:
  PrometheusMetrics(const BuildInfo& build, const LabelValues& values)
      : registry_(std::make_shared<prometheus::Registry>()),
        input_tokens_(CounterFamily(*registry_, kInputTokensTotal).Add({})),
        retained_tokens_(CounterFamily(*registry_, kRetainedTokensTotal).Add({})),
        input_bytes_(CounterFamily(*registry_, kKvInputBytesTotal).Add({})),
        retained_bytes_(CounterFamily(*registry_, kKvRetainedBytesTotal).Add({})),
        kept_fraction_(HistogramFamily(*registry_, kKeptFraction)
                           .Add({}, Histogram::BucketBoundaries(std::begin(kKeptFractionBuckets),
                                                                std::end(kKeptFractionBuckets)))),
        defaulted_inputs_(CounterFamily(*registry_, kDefaultedInputsTotal), kDefaultedInputsTotal,
                          values.defaulted_inputs),
        reloads_(CounterFamily(*registry_, kTableReloadsTotal), kTableReloadsTotal, kReloadValues),
        source_enabled_(GaugeFamily(*registry_, kTableSourceEnabled), kTableSourceEnabled,
                        values.table_sources),
        source_healthy_(GaugeFamily(*registry_, kTableSourceHealthy), kTableSourceHealthy,
                        values.table_sources),
        source_last_sync_(GaugeFamily(*registry_, kTableSourceLastSyncTimestampSeconds),
                          kTableSourceLastSyncTimestampSeconds, values.table_sources),
        source_failures_(CounterFamily(*registry_, kTableSourceFailuresTotal),
                         kTableSourceFailuresTotal, values.table_sources),
        shadow_operations_(CounterFamily(*registry_, kShadowOperationsTotal),
                           kShadowOperationsTotal, kShadowValues),
        shadow_overlap_(HistogramFamily(*registry_, kShadowKeptOverlap)
                            .Add({}, Histogram::BucketBoundaries(std::begin(kOverlapBuckets),
                                                                 std::end(kOverlapBuckets)))),
        shadow_decided_bytes_(CounterFamily(*registry_, kShadowDecidedBytesTotal).Add({})),
        shadow_would_be_bytes_(CounterFamily(*registry_, kShadowWouldBeBytesTotal).Add({})),
        shadow_duration_(HistogramFamily(*registry_, kShadowDurationSeconds)
                             .Add({}, Histogram::BucketBoundaries(std::begin(kStageBucketsSeconds),
                                                                  std::end(kStageBucketsSeconds)))),
        last_success_(GaugeFamily(*registry_, kTableLastSuccessTimestampSeconds).Add({})),
        sessions_(GaugeFamily(*registry_, kSessions).Add({})),
        sessions_ended_(CounterFamily(*registry_, kSessionsEndedTotal), kSessionsEndedTotal,
                        kSessionEndValues),
        regions_(GaugeFamily(*registry_, kRegions), kRegions, values.region_kinds),
        region_bytes_(GaugeFamily(*registry_, kRegionBytes), kRegionBytes, values.region_kinds),
        import_failures_(CounterFamily(*registry_, kRegionImportFailuresTotal),
                         kRegionImportFailuresTotal, values.region_kinds),
        device_memory_(GaugeFamily(*registry_, kDeviceMemoryBytes), kDeviceMemoryBytes,
                       values.region_kinds),
        owned_bytes_(GaugeFamily(*registry_, kOwnedRegionBytes), kOwnedRegionBytes,
                     values.region_kinds),
        quarantined_regions_(GaugeFamily(*registry_, kQuarantinedRegions), kQuarantinedRegions,
                             values.region_kinds),
        quarantined_bytes_(GaugeFamily(*registry_, kQuarantinedBytes), kQuarantinedBytes,
                           values.region_kinds),
        device_workspace_(GaugeFamily(*registry_, kDeviceWorkspaceBytes), kDeviceWorkspaceBytes,
                          kWorkspaceValues),
        credits_(GaugeFamily(*registry_, kCreditsOutstanding).Add({})),
        queue_depth_(GaugeFamily(*registry_, kQueueDepth).Add({})),
        queue_capacity_(GaugeFamily(*registry_, kQueueCapacity).Add({})),
        in_flight_(GaugeFamily(*registry_, kOperationsInFlight).Add({})),
        rejected_(CounterFamily(*registry_, kRejectedTotal), kRejectedTotal, kRejectValues),
        open_fds_(GaugeFamily(*registry_, kProcessOpenFds).Add({})),
        max_fds_(GaugeFamily(*registry_, kProcessMaxFds).Add({})),
        memory_mappings_(GaugeFamily(*registry_, kProcessMemoryMappings).Add({})),
        max_memory_mappings_(GaugeFamily(*registry_, kProcessMaxMemoryMappings).Add({})),
        locked_bytes_(GaugeFamily(*registry_, kProcessLockedMemoryBytes).Add({})),
        max_locked_bytes_(GaugeFamily(*registry_, kProcessMaxLockedMemoryBytes).Add({})),
        resident_bytes_(GaugeFamily(*registry_, kProcessResidentMemoryBytes).Add({})),
        tables_(*registry_) {
    AddOperationSeries(values.policies);
    AddStageSeries();
    for (size_t i = 0; i < rejects_.size(); ++i) rejects_[i] = &rejected_.Of(kRejectValues[i]);
    GaugeFamily(*registry_, kBuildInfo)
        .Add({{"version", build.version}, {"backend", build.backend}})
        .Set(1);
  }

  void RecordOperation(const OperationSample& sample) override {
    OperationCounter(sample).Increment();
    PolicyCounter(sample).Increment();
    for (int i = 0; i < kNumStages; ++i) {
      if (sample.stages[i] > absl::ZeroDuration()) {
        stages_[i]->Observe(absl::ToDoubleSeconds(sample.stages[i]));
      }
    }
    input_tokens_.Increment(static_cast<double>(sample.input_tokens));
    retained_tokens_.Increment(static_cast<double>(sample.kept_tokens));
    input_bytes_.Increment(static_cast<double>(sample.bytes_before));
    retained_bytes_.Increment(static_cast<double>(sample.bytes_after));
    if (sample.input_tokens > 0) {
      kept_fraction_.Observe(static_cast<double>(sample.kept_tokens) /
                             static_cast<double>(sample.input_tokens));
    }
    for (const std::string& input : sample.defaulted_inputs) {
      defaulted_inputs_.Of(input).Increment();
    }
    tables_.RecordOperation(sample);
  }

  void RecordShadow(const ShadowSample& sample) override {
    shadow_operations_.Of(kShadowValues[static_cast<size_t>(sample.result)]).Increment();
    if (sample.result != ShadowSample::Result::kScored) return;
    shadow_overlap_.Observe(sample.kept_overlap);
    shadow_decided_bytes_.Increment(static_cast<double>(sample.decided_bytes));
    shadow_would_be_bytes_.Increment(static_cast<double>(sample.would_be_bytes));
    shadow_duration_.Observe(absl::ToDoubleSeconds(sample.time));
  }

  void RecordReject(Reject why) override { rejects_[static_cast<size_t>(why)]->Increment(); }
  void SetQueueDepth(int64_t waiting) override { queue_depth_.Set(static_cast<double>(waiting)); }
  void SetQueueCapacity(int64_t capacity) override {
    queue_capacity_.Set(static_cast<double>(capacity));
  }
  void SetOperationsInFlight(int64_t running) override {
    in_flight_.Set(static_cast<double>(running));
  }
  void AddCredits(int64_t change) override { credits_.Increment(static_cast<double>(change)); }

  void SetTables(const std::vector<TableInfoSample>& tables, absl::Time now) override {
    tables_.SetTables(tables);
    last_success_.Set(absl::ToDoubleSeconds(now - absl::UnixEpoch()));
  }

  void RecordReload(Reload result) override {
    reloads_.Of(kReloadValues[result == Reload::kSuccess ? 0 : 1]).Increment();
  }

  void EnableTableSource(absl::string_view source) override { source_enabled_.Of(source).Set(1); }
  void RecordSourceSync(absl::string_view source, absl::Time now) override {
    source_last_sync_.Of(source).Set(absl::ToDoubleSeconds(now - absl::UnixEpoch()));
    source_healthy_.Of(source).Set(1);
  }
  void RecordSourceFailure(absl::string_view source) override {
    source_healthy_.Of(source).Set(0);
    source_failures_.Of(source).Increment();
  }

  void SetProcessUsage(const ProcessUsage& usage) override {
    open_fds_.Set(usage.open_fds);
    max_fds_.Set(usage.max_fds);
    memory_mappings_.Set(usage.memory_mappings);
    max_memory_mappings_.Set(usage.max_memory_mappings);
    locked_bytes_.Set(usage.locked_bytes);
    max_locked_bytes_.Set(usage.max_locked_bytes);
    resident_bytes_.Set(usage.resident_bytes);
  }
  void SetSessions(int64_t sessions) override { sessions_.Set(static_cast<double>(sessions)); }
  void SetRegions(absl::string_view kind, int64_t regions, uint64_t bytes) override {
    regions_.Of(kind).Set(static_cast<double>(regions));
    region_bytes_.Of(kind).Set(static_cast<double>(bytes));
  }
  void SetDeviceMemory(absl::string_view kind, uint64_t bytes) override {
    device_memory_.Of(kind).Set(static_cast<double>(bytes));
  }
  void SetOwnedMemory(absl::string_view kind, const OwnedMemorySample& sample) override {
    owned_bytes_.Of(kind).Set(static_cast<double>(sample.bytes));
    quarantined_regions_.Of(kind).Set(static_cast<double>(sample.quarantined_regions));
    quarantined_bytes_.Of(kind).Set(static_cast<double>(sample.quarantined_bytes));
  }
  void SetDeviceWorkspace(const DeviceWorkspaceSample& use) override {
    const int64_t values[] = {use.reserved_bytes, use.used_bytes, use.peak_bytes};
    for (size_t i = 0; i < std::size(kWorkspaceValues); ++i) {
      device_workspace_.Of(kWorkspaceValues[i]).Set(static_cast<double>(values[i]));
    }
  }
  void RecordSessionEnd(absl::string_view why) override { sessions_ended_.Of(why).Increment(); }
  void RecordImportFailure(absl::string_view kind) override {
    import_failures_.Of(kind).Increment();
  }

  std::string Render() const override {
    return prometheus::TextSerializer().Serialize(registry_->Collect());
  }

  absl::StatusOr<std::string> Serve(const std::string& address) override {
    absl::MutexLock lock(&mutex_);
    if (endpoint_ != nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("metrics page is already served on ", endpoint_->address()));
    }
    KEEPSET_ASSIGN_OR_RETURN(endpoint_, MetricsEndpoint::Start(address, registry_));
    return endpoint_->address();
  }

 private:
  using OperationKey = std::pair<std::string, std::string>;

  void AddOperationSeries(const std::vector<std::string>& policies) {
    Family<Counter>& by_outcome = CounterFamily(*registry_, kCompressOperationsTotal);
    const auto add = [&](absl::string_view outcome, absl::string_view reason) {
      OperationKey key(outcome, reason);
      operations_[key] = &by_outcome.Add({{"outcome", key.first}, {"reason", key.second}});
    };
    for (const OutcomeReason& pair : kOutcomeReasons) add(pair.outcome, pair.reason);
    for (absl::string_view outcome : kOutcomes) add(outcome, kOtherValue);
    add(kOtherValue, kOtherValue);

    Family<Counter>& by_policy = CounterFamily(*registry_, kPolicyOperationsTotal);
    std::set<std::string> policy_values(policies.begin(), policies.end());
    policy_values.insert(std::string(kUnknownPolicy));
    policy_values.insert(std::string(kOtherValue));
    for (const std::string& policy : policy_values) {
      const auto add_outcome = [&](absl::string_view outcome) {
        OperationKey key(policy, outcome);
        policy_operations_[key] = &by_policy.Add({{"policy", key.first}, {"outcome", key.second}});
      };
      for (absl::string_view outcome : kOutcomes) add_outcome(outcome);
      add_outcome(kOtherValue);
    }
  }

  void AddStageSeries() {
    Family<Histogram>& family = HistogramFamily(*registry_, kCompressStageDurationSeconds);
    const Histogram::BucketBoundaries buckets(std::begin(kStageBucketsSeconds),
                                              std::end(kStageBucketsSeconds));
    for (int i = 0; i < kNumStages; ++i) {
      stages_[i] = &family.Add({{"stage", std::string(kStageValues[i])}}, buckets);
    }
  }

  Counter& OperationCounter(const OperationSample& sample) const {
    const std::string other(kOtherValue);
    // Canonical codes are written in capitals on the wire, in small letters on the page.
    auto it = operations_.find({sample.outcome, absl::AsciiStrToLower(sample.reason)});
    if (it == operations_.end()) it = operations_.find({sample.outcome, other});
    if (it == operations_.end()) it = operations_.find({other, other});
    return *it->second;
  }

  Counter& PolicyCounter(const OperationSample& sample) const {
    const std::string other(kOtherValue);
    const bool known = policy_operations_.contains({sample.policy, other});
    const std::string& policy = known ? sample.policy : other;
    auto it = policy_operations_.find({policy, sample.outcome});
    if (it == policy_operations_.end()) it = policy_operations_.find({policy, other});
    return *it->second;
  }

  // Held weakly by the listener and by nobody else: it must live as long as the references below.
  const std::shared_ptr<prometheus::Registry> registry_;

  // Never change after construction.
  absl::flat_hash_map<OperationKey, Counter*> operations_;
  absl::flat_hash_map<OperationKey, Counter*> policy_operations_;
  std::array<Histogram*, kNumStages> stages_ = {};
  Counter& input_tokens_;
  Counter& retained_tokens_;
  Counter& input_bytes_;
  Counter& retained_bytes_;
  Histogram& kept_fraction_;
  const LabelledSeries<Counter> defaulted_inputs_;
  const LabelledSeries<Counter> reloads_;
  const LabelledSeries<Gauge> source_enabled_;
  const LabelledSeries<Gauge> source_healthy_;
  const LabelledSeries<Gauge> source_last_sync_;
  const LabelledSeries<Counter> source_failures_;
  const LabelledSeries<Counter> shadow_operations_;
  Histogram& shadow_overlap_;
  Counter& shadow_decided_bytes_;
  Counter& shadow_would_be_bytes_;
  Histogram& shadow_duration_;
  Gauge& last_success_;
  Gauge& sessions_;
  const LabelledSeries<Counter> sessions_ended_;
  const LabelledSeries<Gauge> regions_;
  const LabelledSeries<Gauge> region_bytes_;
  const LabelledSeries<Counter> import_failures_;
  const LabelledSeries<Gauge> device_memory_;
  const LabelledSeries<Gauge> owned_bytes_;
  const LabelledSeries<Gauge> quarantined_regions_;
  const LabelledSeries<Gauge> quarantined_bytes_;
  const LabelledSeries<Gauge> device_workspace_;
  Gauge& credits_;
  Gauge& queue_depth_;
  Gauge& queue_capacity_;
  Gauge& in_flight_;
  const LabelledSeries<Counter> rejected_;
  std::array<Counter*, std::size(kRejectValues)> rejects_ = {};
  Gauge& open_fds_;
  Gauge& max_fds_;
  Gauge& memory_mappings_;
  Gauge& max_memory_mappings_;
  Gauge& locked_bytes_;
  Gauge& max_locked_bytes_;
  Gauge& resident_bytes_;
  TableSeries tables_;

  absl::Mutex mutex_;
  // Last: stops serving before anything above goes.
  std::unique_ptr<MetricsEndpoint> endpoint_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<Metrics> Metrics::New(const BuildInfo& build, const LabelValues& values) {
  return std::make_unique<PrometheusMetrics>(build, values);
}

}  // namespace keepset::service
