#include "service/metrics/metrics.h"

#include <array>
#include <cstddef>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"
#include "service/metrics/metric_names.h"
#include "service/metrics/metrics_endpoint.h"

namespace keepset::service {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

static_assert(std::size(kStageValues) == kNumStages);
static_assert(std::size(kRejectValues) == static_cast<size_t>(Reject::kFence) + 1);

constexpr absl::string_view kUnknownPolicy = "unknown";

Family<Counter>& CounterFamily(prometheus::Registry& registry, const MetricInfo& info) {
  KEEPSET_CHECK(info.type == MetricType::kCounter);
  return prometheus::BuildCounter()
      .Name(std::string(info.name))
      .Help(std::string(info.help))
      .Register(registry);
}

Family<Gauge>& GaugeFamily(prometheus::Registry& registry, const MetricInfo& info) {
  KEEPSET_CHECK(info.type == MetricType::kGauge);
  return prometheus::BuildGauge()
      .Name(std::string(info.name))
      .Help(std::string(info.help))
      .Register(registry);
}

Family<Histogram>& HistogramFamily(prometheus::Registry& registry, const MetricInfo& info) {
  KEEPSET_CHECK(info.type == MetricType::kHistogram);
  return prometheus::BuildHistogram()
      .Name(std::string(info.name))
      .Help(std::string(info.help))
      .Register(registry);
}

// The series of a family with one label, made at construction; a value outside the set is
// kOtherValue's series.
template <typename T>
class LabelledSeries {
 public:
  template <typename Values>
  LabelledSeries(Family<T>& family, const MetricInfo& info, const Values& values) {
    for (const auto& value : values) Add(family, info, value);
    Add(family, info, kOtherValue);
  }

  T& Of(absl::string_view value) const {
    const auto it = series_.find(value);
    return it == series_.end() ? *series_.find(kOtherValue)->second : *it->second;
  }

 private:
  void Add(Family<T>& family, const MetricInfo& info, absl::string_view value) {
    series_[std::string(value)] = &family.Add({{std::string(info.labels), std::string(value)}});
  }

  absl::flat_hash_map<std::string, T*> series_;
};

class PrometheusMetrics : public Metrics {
 public:
  PrometheusMetrics(const BuildInfo& build, const std::vector<std::string>& policies,
                    const std::vector<std::string>& region_kinds)
      : registry_(std::make_shared<prometheus::Registry>()),
        input_tokens_(CounterFamily(*registry_, kInputTokensTotal).Add({})),
        retained_tokens_(CounterFamily(*registry_, kRetainedTokensTotal).Add({})),
        input_bytes_(CounterFamily(*registry_, kKvInputBytesTotal).Add({})),
        retained_bytes_(CounterFamily(*registry_, kKvRetainedBytesTotal).Add({})),
        kept_fraction_(HistogramFamily(*registry_, kKeptFraction)
                           .Add({}, Histogram::BucketBoundaries(std::begin(kKeptFractionBuckets),
                                                                std::end(kKeptFractionBuckets)))),
        defaulted_inputs_(CounterFamily(*registry_, kDefaultedInputsTotal), kDefaultedInputsTotal,
                          kDefaultedInputValues),
        reloads_(CounterFamily(*registry_, kTableReloadsTotal), kTableReloadsTotal, kReloadValues),
        last_success_(GaugeFamily(*registry_, kTableLastSuccessTimestampSeconds).Add({})),
        sessions_(GaugeFamily(*registry_, kSessions).Add({})),
        sessions_ended_(CounterFamily(*registry_, kSessionsEndedTotal), kSessionsEndedTotal,
                        kSessionEndValues),
        regions_(GaugeFamily(*registry_, kRegions), kRegions, region_kinds),
        region_bytes_(GaugeFamily(*registry_, kRegionBytes), kRegionBytes, region_kinds),
        import_failures_(CounterFamily(*registry_, kRegionImportFailuresTotal),
                         kRegionImportFailuresTotal, region_kinds),
        queue_depth_(GaugeFamily(*registry_, kQueueDepth).Add({})),
        in_flight_(GaugeFamily(*registry_, kOperationsInFlight).Add({})),
        rejected_(CounterFamily(*registry_, kRejectedTotal), kRejectedTotal, kRejectValues),
        table_info_(GaugeFamily(*registry_, kTableInfo)) {
    AddOperationSeries(policies);
    AddStageSeries();
    for (size_t i = 0; i < rejects_.size(); ++i) rejects_[i] = &rejected_.Of(kRejectValues[i]);
    tables_[{}] = &table_info_.Add(Labels({}));
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
  }

  void RecordReject(Reject why) override { rejects_[static_cast<size_t>(why)]->Increment(); }
  void SetQueueDepth(int64_t waiting) override { queue_depth_.Set(static_cast<double>(waiting)); }
  void SetOperationsInFlight(int64_t running) override {
    in_flight_.Set(static_cast<double>(running));
  }

  void SetTables(const std::vector<TableInfoSample>& tables, absl::Time now) override {
    std::set<TableKey> wanted;
    for (const TableInfoSample& t : tables) wanted.insert({t.model, t.name, t.version, t.digest});
    const bool none = wanted.empty();
    if (none) wanted.insert(TableKey{});
    absl::MutexLock lock(&mutex_);
    // New series appear before old ones go: a scrape in between never finds a gap.
    for (const TableKey& key : wanted) {
      Gauge*& gauge = tables_[key];
      if (gauge == nullptr) gauge = &table_info_.Add(Labels(key));
      gauge->Set(none ? 0 : 1);
    }
    for (auto it = tables_.begin(); it != tables_.end();) {
      if (wanted.count(it->first) != 0) {
        ++it;
        continue;
      }
      table_info_.Remove(it->second);
      it = tables_.erase(it);
    }
    last_success_.Set(absl::ToDoubleSeconds(now - absl::UnixEpoch()));
  }

  void RecordReload(Reload result) override {
    reloads_.Of(kReloadValues[result == Reload::kSuccess ? 0 : 1]).Increment();
  }

  void SetSessions(int64_t sessions) override { sessions_.Set(static_cast<double>(sessions)); }
  void SetRegions(absl::string_view kind, int64_t regions, uint64_t bytes) override {
    regions_.Of(kind).Set(static_cast<double>(regions));
    region_bytes_.Of(kind).Set(static_cast<double>(bytes));
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
  using TableKey = std::array<std::string, 4>;  // model, name, version, digest
  using OperationKey = std::pair<std::string, std::string>;

  static prometheus::Labels Labels(const TableKey& key) {
    return {{"model", key[0]}, {"name", key[1]}, {"version", key[2]}, {"digest", key[3]}};
  }

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
  Gauge& last_success_;
  Gauge& sessions_;
  const LabelledSeries<Counter> sessions_ended_;
  const LabelledSeries<Gauge> regions_;
  const LabelledSeries<Gauge> region_bytes_;
  const LabelledSeries<Counter> import_failures_;
  Gauge& queue_depth_;
  Gauge& in_flight_;
  const LabelledSeries<Counter> rejected_;
  std::array<Counter*, std::size(kRejectValues)> rejects_ = {};
  Family<Gauge>& table_info_;

  absl::Mutex mutex_;
  std::map<TableKey, Gauge*> tables_ ABSL_GUARDED_BY(mutex_);
  // Last: stops serving before anything above goes.
  std::unique_ptr<MetricsEndpoint> endpoint_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<Metrics> Metrics::New(const BuildInfo& build,
                                      const std::vector<std::string>& policies,
                                      const std::vector<std::string>& region_kinds) {
  return std::make_unique<PrometheusMetrics>(build, policies, region_kinds);
}

}  // namespace keepset::service
