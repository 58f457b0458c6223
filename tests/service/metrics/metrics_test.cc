#include "service/metrics/metrics.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/metrics/metric_names.h"
#include "tests/service/metrics/exposition_page.h"

namespace keepset::service {
namespace {

std::unique_ptr<Metrics> NewTestMetrics() {
  return Metrics::New({"0.1.0", "cpu/scalar"}, {.policies = {"compilerkv", "snapkv", "full"},
                                                .region_kinds = {"memfd", "posix_shm"},
                                                .defaulted_inputs = {"ppl"},
                                                .table_sources = {"directory", "etcd"}});
}

std::set<std::string> SeriesNames(const Metrics& metrics) {
  std::set<std::string> names;
  for (const auto& [name, value] : ParsePage(metrics.Render()).series) names.insert(name);
  return names;
}

OperationSample CompressedSample() {
  OperationSample sample;
  sample.policy = "snapkv";
  sample.outcome = "compressed";
  sample.reason = "none";
  sample.stages[static_cast<int>(Stage::kScore)] = absl::Milliseconds(3);
  sample.input_tokens = 1000;
  sample.kept_tokens = 250;
  sample.bytes_before = 64000;
  sample.bytes_after = 16000;
  return sample;
}

TEST(Metrics, CreditsAddUpOverStreams) {
  const auto metrics = NewTestMetrics();
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()), "keepset_credits_outstanding"), 0);
  metrics->AddCredits(64);
  metrics->AddCredits(32);
  metrics->AddCredits(-65);
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()), "keepset_credits_outstanding"), 31);
}

TEST(Metrics, OwnedAndQuarantinedMemoryIsShownByKind) {
  const auto metrics = NewTestMetrics();
  const auto value = [&](const std::string& name) {
    return ValueOf(ParsePage(metrics->Render()), name + "{kind=\"memfd\"}");
  };
  EXPECT_EQ(value("keepset_owned_region_bytes"), 0);
  metrics->SetOwnedMemory("memfd",
                          {.bytes = 8192, .quarantined_regions = 1, .quarantined_bytes = 4096});
  EXPECT_EQ(value("keepset_owned_region_bytes"), 8192);
  EXPECT_EQ(value("keepset_quarantined_regions"), 1);
  EXPECT_EQ(value("keepset_quarantined_bytes"), 4096);
}

TEST(Metrics, DeviceMemoryIsThereFromTheStartByKind) {
  const auto metrics = NewTestMetrics();
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()), "keepset_device_memory_bytes{kind=\"memfd\"}"),
            0);
  metrics->SetDeviceMemory("memfd", 4096);
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()), "keepset_device_memory_bytes{kind=\"memfd\"}"),
            4096);
}

TEST(Metrics, DeviceWorkspaceIsToldByState) {
  const auto metrics = NewTestMetrics();
  metrics->SetDeviceWorkspace({.reserved_bytes = 4096, .used_bytes = 512, .peak_bytes = 1024});
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(ValueOf(page, "keepset_device_workspace_bytes{state=\"reserved\"}"), 4096);
  EXPECT_EQ(ValueOf(page, "keepset_device_workspace_bytes{state=\"used\"}"), 512);
  EXPECT_EQ(ValueOf(page, "keepset_device_workspace_bytes{state=\"peak\"}"), 1024);
}

TEST(MetricNames, CarryPrefixAndUnitSuffix) {
  for (const MetricInfo& info : kAllMetrics) {
    EXPECT_TRUE(absl::StartsWith(info.name, "keepset_")) << info.name;
    EXPECT_EQ(info.type == MetricType::kCounter, absl::EndsWith(info.name, "_total")) << info.name;
    for (absl::string_view unit :
         {"_ms", "_us", "_ns", "_milliseconds", "_kb", "_mb", "_percent"}) {
      EXPECT_FALSE(absl::StrContains(info.name, unit)) << info.name;
    }
    if (absl::StrContains(info.name, "duration")) {
      EXPECT_TRUE(absl::EndsWith(info.name, "_seconds")) << info.name;
    }
    EXPECT_TRUE(absl::EndsWith(info.help, ".")) << info.name;
  }
}

TEST(MetricNames, LabelsNameNoRequestSessionOrTenant) {
  for (const MetricInfo& info : kAllMetrics) {
    for (absl::string_view label : absl::StrSplit(info.labels, ',', absl::SkipEmpty())) {
      for (absl::string_view forbidden :
           {"id", "session", "session_id", "request", "request_id", "tenant", "region", "le"}) {
        EXPECT_NE(label, forbidden) << info.name;
      }
    }
  }
}

TEST(Metrics, StartsWithEveryFamilyOfTheList) {
  const ExpositionPage page = ParsePage(NewTestMetrics()->Render());
  for (const MetricInfo& info : kAllMetrics) {
    ASSERT_TRUE(page.families.contains(std::string(info.name))) << info.name;
  }
  EXPECT_EQ(page.families.size(), std::size(kAllMetrics));
}

TEST(Metrics, StartsWithEverySeriesAtZero) {
  const ExpositionPage page = ParsePage(NewTestMetrics()->Render());
  for (const OutcomeReason& pair : kOutcomeReasons) {
    EXPECT_EQ(ValueOf(page, absl::StrCat("keepset_compress_operations_total{outcome=\"",
                                         pair.outcome, "\",reason=\"", pair.reason, "\"}")),
              0);
  }
  for (absl::string_view stage : kStageValues) {
    EXPECT_EQ(ValueOf(page, absl::StrCat("keepset_compress_stage_duration_seconds_count{stage=\"",
                                         stage, "\"}")),
              0);
  }
  EXPECT_EQ(ValueOf(page, "keepset_kept_fraction_count"), 0);
  EXPECT_EQ(ValueOf(page, "keepset_regions{kind=\"memfd\"}"), 0);
  EXPECT_EQ(ValueOf(page, "keepset_rejected_total{reason=\"queue_full\"}"), 0);
  EXPECT_EQ(ValueOf(page, "keepset_table_reloads_total{result=\"refused\"}"), 0);
  EXPECT_EQ(ValueOf(page, "keepset_build_info{backend=\"cpu/scalar\",version=\"0.1.0\"}"), 1);
}

TEST(Metrics, AddsWhatAnOperationReports) {
  const auto metrics = NewTestMetrics();
  metrics->RecordOperation(CompressedSample());
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(
      ValueOf(page, "keepset_compress_operations_total{outcome=\"compressed\",reason=\"none\"}"),
      1);
  EXPECT_EQ(
      ValueOf(page, "keepset_policy_operations_total{outcome=\"compressed\",policy=\"snapkv\"}"),
      1);
  EXPECT_EQ(ValueOf(page, "keepset_input_tokens_total"), 1000);
  EXPECT_EQ(ValueOf(page, "keepset_retained_tokens_total"), 250);
  EXPECT_EQ(ValueOf(page, "keepset_kv_input_bytes_total"), 64000);
  EXPECT_EQ(ValueOf(page, "keepset_kv_retained_bytes_total"), 16000);
  EXPECT_EQ(ValueOf(page, "keepset_kept_fraction_bucket{le=\"0.2\"}"), 0);
  EXPECT_EQ(ValueOf(page, "keepset_kept_fraction_bucket{le=\"0.3\"}"), 1);
}

TEST(Metrics, ObservesOnlyStagesThatWerePassed) {
  const auto metrics = NewTestMetrics();
  metrics->RecordOperation(CompressedSample());
  const ExpositionPage page = ParsePage(metrics->Render());
  const std::string name = "keepset_compress_stage_duration_seconds";
  EXPECT_EQ(ValueOf(page, name + "_count{stage=\"score\"}"), 1);
  EXPECT_EQ(ValueOf(page, name + "_sum{stage=\"score\"}"), 0.003);
  EXPECT_EQ(ValueOf(page, name + "_count{stage=\"gather\"}"), 0);
}

TEST(Metrics, CountsCanonicalCodesInEitherCase) {
  const auto metrics = NewTestMetrics();
  OperationSample sample;
  sample.policy = "full";
  sample.outcome = "error";
  for (const char* reason : {"INVALID_ARGUMENT", "invalid_argument"}) {
    sample.reason = reason;
    metrics->RecordOperation(sample);
  }
  EXPECT_EQ(
      ValueOf(ParsePage(metrics->Render()),
              "keepset_compress_operations_total{outcome=\"error\",reason=\"invalid_argument\"}"),
      2);
}

TEST(Metrics, GrowsNoSeriesForUnknownLabelValues) {
  const auto metrics = NewTestMetrics();
  const std::set<std::string> before = SeriesNames(*metrics);
  for (int i = 0; i < 20; ++i) {
    OperationSample sample = CompressedSample();
    sample.policy = absl::StrCat("policy", i);
    sample.outcome = absl::StrCat("outcome", i);
    sample.reason = absl::StrCat("reason", i);
    sample.defaulted_inputs = {absl::StrCat("input", i)};
    metrics->RecordOperation(sample);
    metrics->RecordSessionEnd(absl::StrCat("why", i));
    metrics->RecordImportFailure(absl::StrCat("kind", i));
    metrics->SetRegions(absl::StrCat("kind", i), i, 1);
  }
  EXPECT_EQ(SeriesNames(*metrics), before);
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(ValueOf(page, "keepset_compress_operations_total{outcome=\"other\",reason=\"other\"}"),
            20);
  EXPECT_EQ(ValueOf(page, "keepset_policy_operations_total{outcome=\"other\",policy=\"other\"}"),
            20);
  EXPECT_EQ(ValueOf(page, "keepset_defaulted_inputs_total{input=\"other\"}"), 20);
  EXPECT_EQ(ValueOf(page, "keepset_sessions_ended_total{reason=\"other\"}"), 20);
  EXPECT_EQ(ValueOf(page, "keepset_region_import_failures_total{kind=\"other\"}"), 20);
}

TEST(Metrics, KeepsOutcomeOfUnknownReason) {
  const auto metrics = NewTestMetrics();
  OperationSample sample = CompressedSample();
  sample.outcome = "kept_full";
  sample.reason = "full moon";
  metrics->RecordOperation(sample);
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()),
                    "keepset_compress_operations_total{outcome=\"kept_full\",reason=\"other\"}"),
            1);
}

TEST(Metrics, CountsEveryRejectUnderItsOwnReason) {
  const auto metrics = NewTestMetrics();
  const Reject all[] = {Reject::kQueueFull, Reject::kStreamFull,     Reject::kNoCredit,
                        Reject::kNoMemory,  Reject::kInlineTooLarge, Reject::kDraining,
                        Reject::kInvalid,   Reject::kNotFound,       Reject::kPrecondition,
                        Reject::kFence};
  for (Reject why : all) metrics->RecordReject(why);
  const ExpositionPage page = ParsePage(metrics->Render());
  for (const char* reason :
       {"queue_full", "stream_full", "no_credit", "no_memory", "inline_too_large", "draining",
        "invalid", "not_found", "precondition", "fence"}) {
    EXPECT_EQ(ValueOf(page, absl::StrCat("keepset_rejected_total{reason=\"", reason, "\"}")), 1);
  }
}

TEST(Metrics, TableInfoFollowsTheActiveSet) {
  const auto metrics = NewTestMetrics();
  const std::string none = "keepset_table_info{digest=\"\",model=\"\",name=\"\",version=\"\"}";
  const std::string a =
      "keepset_table_info{digest=\"sha256:aa\",model=\"llama\",name=\"a\",version=\"1\"}";
  const std::string b =
      "keepset_table_info{digest=\"sha256:bb\",model=\"llama\",name=\"a\",version=\"2\"}";
  EXPECT_EQ(ValueOf(ParsePage(metrics->Render()), none), 0);

  metrics->SetTables({{"llama", "a", "1", "sha256:aa"}}, absl::FromUnixSeconds(1700000000));
  ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(ValueOf(page, a), 1);
  EXPECT_FALSE(page.series.contains(none));
  EXPECT_EQ(ValueOf(page, "keepset_table_last_success_timestamp_seconds"), 1700000000);

  metrics->SetTables({{"llama", "a", "2", "sha256:bb"}}, absl::FromUnixSeconds(1700000001));
  page = ParsePage(metrics->Render());
  EXPECT_EQ(ValueOf(page, b), 1);
  EXPECT_FALSE(page.series.contains(a));

  metrics->SetTables({}, absl::FromUnixSeconds(1700000002));
  page = ParsePage(metrics->Render());
  EXPECT_EQ(ValueOf(page, none), 0);
  EXPECT_FALSE(page.series.contains(b));
}

TEST(Metrics, GaugesShowTheLastValue) {
  const auto metrics = NewTestMetrics();
  metrics->SetQueueDepth(7);
  metrics->SetQueueDepth(3);
  metrics->SetOperationsInFlight(2);
  metrics->SetSessions(4);
  metrics->SetRegions("memfd", 5, 1 << 20);
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(ValueOf(page, "keepset_queue_depth"), 3);
  EXPECT_EQ(ValueOf(page, "keepset_operations_in_flight"), 2);
  EXPECT_EQ(ValueOf(page, "keepset_sessions"), 4);
  EXPECT_EQ(ValueOf(page, "keepset_regions{kind=\"memfd\"}"), 5);
  EXPECT_EQ(ValueOf(page, "keepset_region_bytes{kind=\"memfd\"}"), 1 << 20);
}

TEST(Metrics, LosesNoCountUnderConcurrentRecordingAndScraping) {
  const auto metrics = NewTestMetrics();
  constexpr int kThreads = 4;
  constexpr int kPerThread = 500;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&metrics, t] {
      for (int i = 0; i < kPerThread; ++i) {
        metrics->RecordOperation(CompressedSample());
        metrics->RecordReload(Metrics::Reload::kRefused);
        if (i % 100 == 0) {
          metrics->SetTables({{"llama", "a", absl::StrCat(t), "sha256:aa"}}, absl::UnixEpoch());
          EXPECT_FALSE(metrics->Render().empty());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const ExpositionPage page = ParsePage(metrics->Render());
  EXPECT_EQ(
      ValueOf(page, "keepset_compress_operations_total{outcome=\"compressed\",reason=\"none\"}"),
      kThreads * kPerThread);
  EXPECT_EQ(ValueOf(page, "keepset_compress_stage_duration_seconds_count{stage=\"score\"}"),
            kThreads * kPerThread);
  EXPECT_EQ(ValueOf(page, "keepset_table_reloads_total{result=\"refused\"}"),
            kThreads * kPerThread);
  EXPECT_EQ(std::count_if(page.series.begin(), page.series.end(),
                          [](const auto& entry) {
                            return absl::StartsWith(entry.first, "keepset_table_info{");
                          }),
            1);
}

}  // namespace
}  // namespace keepset::service
