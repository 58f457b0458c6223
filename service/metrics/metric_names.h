// The one list of series keepsetd exports. metrics.cc creates every one of them at start and
// nothing else; docs/metrics.md is written from it. Base units (seconds, bytes), `_total` for
// counters, no request, session or tenant in a label.
#ifndef KEEPSET_SERVICE_METRICS_METRIC_NAMES_H_
#define KEEPSET_SERVICE_METRICS_METRIC_NAMES_H_

#include "absl/strings/string_view.h"

namespace keepset::service {

enum class MetricType { kCounter, kGauge, kHistogram };

struct MetricInfo {
  absl::string_view name;
  MetricType type = MetricType::kCounter;
  absl::string_view labels;  // comma-separated, "" for none
  absl::string_view help;
};

inline constexpr MetricInfo kCompressOperationsTotal = {
    "keepset_compress_operations_total", MetricType::kCounter, "outcome,reason",
    "Ended operations; the reason of an error is its canonical code."};
inline constexpr MetricInfo kPolicyOperationsTotal = {"keepset_policy_operations_total",
                                                      MetricType::kCounter, "policy,outcome",
                                                      "Ended operations by retention policy."};
inline constexpr MetricInfo kCompressStageDurationSeconds = {
    "keepset_compress_stage_duration_seconds", MetricType::kHistogram, "stage",
    "Time an operation spent in one stage; a stage it did not pass is not observed."};
inline constexpr MetricInfo kModelOperationsTotal = {
    "keepset_model_operations_total", MetricType::kCounter, "model,outcome",
    "Ended operations by model; a model without an active table counts as other."};
inline constexpr MetricInfo kModelInputTokensTotal = {
    "keepset_model_input_tokens_total", MetricType::kCounter, "model",
    "Tokens times layers that operations looked at, by model."};
inline constexpr MetricInfo kModelRetainedTokensTotal = {
    "keepset_model_retained_tokens_total", MetricType::kCounter, "model",
    "Tokens times layers that operations kept, by model."};
inline constexpr MetricInfo kInputTokensTotal = {"keepset_input_tokens_total", MetricType::kCounter,
                                                 "",
                                                 "Tokens times layers that operations looked at."};
inline constexpr MetricInfo kRetainedTokensTotal = {"keepset_retained_tokens_total",
                                                    MetricType::kCounter, "",
                                                    "Tokens times layers that operations kept."};
inline constexpr MetricInfo kKvInputBytesTotal = {
    "keepset_kv_input_bytes_total", MetricType::kCounter, "", "K and V bytes before compression."};
inline constexpr MetricInfo kKvRetainedBytesTotal = {"keepset_kv_retained_bytes_total",
                                                     MetricType::kCounter, "",
                                                     "K and V bytes after compression."};
inline constexpr MetricInfo kKeptFraction = {
    "keepset_kept_fraction", MetricType::kHistogram, "",
    "Share of its tokens an operation kept, over all layers; 1 is the full cache."};
inline constexpr MetricInfo kDefaultedInputsTotal = {
    "keepset_defaulted_inputs_total", MetricType::kCounter, "input",
    "Operations that went on with a default for an input the request did not carry."};
inline constexpr MetricInfo kRiskBinOperationsTotal = {
    "keepset_risk_bin_operations_total", MetricType::kCounter, "entropy_bin,ppl_bin",
    "Operations by the cell of the table's grid that their entropy and perplexity chose. "
    "Operations "
    "whose layers choose for themselves are not among them."};
inline constexpr MetricInfo kTableInfo = {
    "keepset_table_info", MetricType::kGauge, "model,name,version,digest",
    "1 for each active table; one series with empty labels and value 0 while there is none."};
inline constexpr MetricInfo kTableReloadsTotal = {
    "keepset_table_reloads_total", MetricType::kCounter, "result",
    "Table sets published (success) and table files refused (refused)."};
inline constexpr MetricInfo kTableLastSuccessTimestampSeconds = {
    "keepset_table_last_success_timestamp_seconds", MetricType::kGauge, "",
    "Unix time of the last published table set; 0 before the first."};
inline constexpr MetricInfo kTableCreatedTimestampSeconds = {
    "keepset_table_created_timestamp_seconds", MetricType::kGauge, "model,name,version,digest",
    "Unix time at which an active table was compiled, as its provenance says; 0 when it does not."};
inline constexpr MetricInfo kTableSourceEnabled = {
    "keepset_table_source_enabled", MetricType::kGauge, "source",
    "1 when tables of this server come from this source."};
inline constexpr MetricInfo kTableSourceHealthy = {
    "keepset_table_source_healthy", MetricType::kGauge, "source",
    "1 when the source could be read at the last attempt; 0 when not, and while it is not "
    "enabled."};
inline constexpr MetricInfo kTableSourceLastSyncTimestampSeconds = {
    "keepset_table_source_last_sync_timestamp_seconds", MetricType::kGauge, "source",
    "Unix time at which the source was last read to its end; 0 before the first time."};
inline constexpr MetricInfo kTableSourceFailuresTotal = {
    "keepset_table_source_failures_total", MetricType::kCounter, "source",
    "Attempts to read the source that failed."};
inline constexpr MetricInfo kShadowOperationsTotal = {
    "keepset_shadow_operations_total", MetricType::kCounter, "result",
    "Operations that a second table was asked about, by what came of it."};
inline constexpr MetricInfo kShadowKeptOverlap = {
    "keepset_shadow_kept_overlap", MetricType::kHistogram, "",
    "Share of the positions kept by the deciding table that the shadow table keeps too, mean over "
    "layers."};
inline constexpr MetricInfo kShadowDecidedBytesTotal = {
    "keepset_shadow_decided_bytes_total", MetricType::kCounter, "",
    "K and V bytes kept by the deciding table in operations that were scored twice."};
inline constexpr MetricInfo kShadowWouldBeBytesTotal = {
    "keepset_shadow_would_be_bytes_total", MetricType::kCounter, "",
    "K and V bytes the shadow table would have kept in the same operations."};
inline constexpr MetricInfo kShadowDurationSeconds = {
    "keepset_shadow_duration_seconds", MetricType::kHistogram, "",
    "Time the shadow table's scores and keep sets took, apart from the operation's own."};
inline constexpr MetricInfo kSessions = {"keepset_sessions", MetricType::kGauge, "",
                                         "Open sessions."};
inline constexpr MetricInfo kSessionsEndedTotal = {"keepset_sessions_ended_total",
                                                   MetricType::kCounter, "reason",
                                                   "Ended sessions by why they ended."};
inline constexpr MetricInfo kRegions = {"keepset_regions", MetricType::kGauge, "kind",
                                        "Registered memory regions."};
inline constexpr MetricInfo kRegionBytes = {"keepset_region_bytes", MetricType::kGauge, "kind",
                                            "Bytes of registered memory regions."};
inline constexpr MetricInfo kRegionImportFailuresTotal = {
    "keepset_region_import_failures_total", MetricType::kCounter, "kind",
    "Registrations and allocations of regions that were refused."};
inline constexpr MetricInfo kDeviceMemoryBytes = {
    "keepset_device_memory_bytes", MetricType::kGauge, "kind",
    "Device memory of workers that mappings of this server keep allocated: whole allocations, of "
    "which regions are parts."};
inline constexpr MetricInfo kOwnedRegionBytes = {
    "keepset_owned_region_bytes", MetricType::kGauge, "kind",
    "Memory of this server's own that it made for workers, quarantined memory included."};
inline constexpr MetricInfo kQuarantinedRegions = {
    "keepset_quarantined_regions", MetricType::kGauge, "kind",
    "Regions of this server's own that nobody may use and a worker may still have mapped."};
inline constexpr MetricInfo kQuarantinedBytes = {
    "keepset_quarantined_bytes", MetricType::kGauge, "kind",
    "Memory of this server's own that nobody may use and a worker may still have mapped."};
inline constexpr MetricInfo kDeviceWorkspaceBytes = {
    "keepset_device_workspace_bytes", MetricType::kGauge, "state",
    "Device memory of this server for operations: allocated (reserved), in use by operations "
    "(used), and how much would have done since the start, gaps included (peak)."};
inline constexpr MetricInfo kCreditsOutstanding = {
    "keepset_credits_outstanding", MetricType::kGauge, "",
    "Layer inputs that workers may send on their open streams: granted and not used."};
inline constexpr MetricInfo kQueueDepth = {"keepset_queue_depth", MetricType::kGauge, "",
                                           "Operations waiting for a worker thread."};
inline constexpr MetricInfo kQueueCapacity = {
    "keepset_queue_capacity", MetricType::kGauge, "",
    "Operations that may wait for a worker thread before one is refused or shed."};
inline constexpr MetricInfo kOperationsInFlight = {
    "keepset_operations_in_flight", MetricType::kGauge, "", "Operations begun and not yet ended."};
inline constexpr MetricInfo kRejectedTotal = {"keepset_rejected_total", MetricType::kCounter,
                                              "reason",
                                              "Requests refused before an operation began."};
inline constexpr MetricInfo kProcessOpenFds = {"keepset_process_open_fds", MetricType::kGauge, "",
                                               "File descriptors the process has open."};
inline constexpr MetricInfo kProcessMaxFds = {
    "keepset_process_max_fds", MetricType::kGauge, "",
    "File descriptors the process may have open (soft limit)."};
inline constexpr MetricInfo kProcessMemoryMappings = {
    "keepset_process_memory_mappings", MetricType::kGauge, "", "Memory mappings of the process."};
inline constexpr MetricInfo kProcessMaxMemoryMappings = {
    "keepset_process_max_memory_mappings", MetricType::kGauge, "",
    "Memory mappings the kernel allows a process (vm.max_map_count)."};
inline constexpr MetricInfo kProcessLockedMemoryBytes = {"keepset_process_locked_memory_bytes",
                                                         MetricType::kGauge, "",
                                                         "Memory the process has locked."};
inline constexpr MetricInfo kProcessMaxLockedMemoryBytes = {
    "keepset_process_max_locked_memory_bytes", MetricType::kGauge, "",
    "Memory the process may lock (soft limit); +Inf when there is no limit."};
inline constexpr MetricInfo kProcessResidentMemoryBytes = {"keepset_process_resident_memory_bytes",
                                                           MetricType::kGauge, "",
                                                           "Resident memory of the process."};
inline constexpr MetricInfo kBuildInfo = {"keepset_build_info", MetricType::kGauge,
                                          "version,backend", "Always 1; states what is running."};

inline constexpr MetricInfo kAllMetrics[] = {kCompressOperationsTotal,
                                             kPolicyOperationsTotal,
                                             kCompressStageDurationSeconds,
                                             kModelOperationsTotal,
                                             kModelInputTokensTotal,
                                             kModelRetainedTokensTotal,
                                             kInputTokensTotal,
                                             kRetainedTokensTotal,
                                             kKvInputBytesTotal,
                                             kKvRetainedBytesTotal,
                                             kKeptFraction,
                                             kDefaultedInputsTotal,
                                             kRiskBinOperationsTotal,
                                             kTableInfo,
                                             kTableReloadsTotal,
                                             kTableLastSuccessTimestampSeconds,
                                             kTableCreatedTimestampSeconds,
                                             kTableSourceEnabled,
                                             kTableSourceHealthy,
                                             kTableSourceLastSyncTimestampSeconds,
                                             kTableSourceFailuresTotal,
                                             kShadowOperationsTotal,
                                             kShadowKeptOverlap,
                                             kShadowDecidedBytesTotal,
                                             kShadowWouldBeBytesTotal,
                                             kShadowDurationSeconds,
                                             kSessions,
                                             kSessionsEndedTotal,
                                             kRegions,
                                             kRegionBytes,
                                             kRegionImportFailuresTotal,
                                             kDeviceMemoryBytes,
                                             kOwnedRegionBytes,
                                             kQuarantinedRegions,
                                             kQuarantinedBytes,
                                             kDeviceWorkspaceBytes,
                                             kCreditsOutstanding,
                                             kQueueDepth,
                                             kQueueCapacity,
                                             kOperationsInFlight,
                                             kRejectedTotal,
                                             kProcessOpenFds,
                                             kProcessMaxFds,
                                             kProcessMemoryMappings,
                                             kProcessMaxMemoryMappings,
                                             kProcessLockedMemoryBytes,
                                             kProcessMaxLockedMemoryBytes,
                                             kProcessResidentMemoryBytes,
                                             kBuildInfo};

// The closed sets of label values. A value outside its set counts as kOtherValue, so a label never
// grows with traffic. The values of `policy`, `kind`, `input` and `source` are handed to
// Metrics::New; those of `model`, `entropy_bin` and `ppl_bin` follow the active tables, up to the
// limits below.
inline constexpr absl::string_view kOtherValue = "other";
// Policy of operations whose request names one that this build does not have.
inline constexpr absl::string_view kUnknownPolicy = "unknown";

struct OutcomeReason {
  absl::string_view outcome;
  absl::string_view reason;
};
inline constexpr OutcomeReason kOutcomeReasons[] = {
    {"compressed", "none"},
    {"kept_full", "none"},
    {"kept_full", "below_budget"},
    {"kept_full", "no_saving"},
    {"kept_full", "shed"},
    {"kept_full", "deadline"},
    {"kept_full", "device_fault"},
    {"shadow", "none"},
    {"shadow", "below_budget"},
    {"shadow", "no_saving"},
    {"shadow", "shed"},
    {"shadow", "deadline"},
    {"shadow", "device_fault"},
    {"error", "invalid_argument"},
    {"error", "not_found"},
    {"error", "already_exists"},
    {"error", "failed_precondition"},
    {"error", "aborted"},
    {"error", "resource_exhausted"},
    {"error", "unavailable"},
    {"error", "permission_denied"},
    {"error", "unauthenticated"},
    {"error", "deadline_exceeded"},
    {"error", "cancelled"},
    {"error", "unimplemented"},
    {"error", "out_of_range"},
    {"error", "data_loss"},
    {"error", "internal"},
    {"error", "unknown"},
    {"cancelled", "none"},
    {"cancelled", "cancelled"},
};
inline constexpr absl::string_view kOutcomes[] = {"compressed", "kept_full", "shadow", "error",
                                                  "cancelled"};
inline constexpr absl::string_view kStageValues[] = {"queue",  "lease",  "score",
                                                     "select", "gather", "reply"};
inline constexpr absl::string_view kReloadValues[] = {"success", "refused"};
inline constexpr absl::string_view kShadowValues[] = {"scored", "skipped", "failed"};
inline constexpr absl::string_view kWorkspaceValues[] = {"reserved", "used", "peak"};
inline constexpr absl::string_view kSessionEndValues[] = {"closed", "replaced", "hang_up",
                                                          "lease_expired", "shutdown"};
inline constexpr absl::string_view kRejectValues[] = {
    "queue_full", "stream_full", "no_credit", "no_memory",    "inline_too_large",
    "draining",   "invalid",     "not_found", "precondition", "fence"};

// Models with series of their own; the first ones in alphabetical order when more are active.
inline constexpr int kMaxModelValues = 64;
// Bins of one axis with series of their own; cells beyond count as other, other.
inline constexpr int kMaxEntropyBins = 64;
inline constexpr int kMaxPplBins = 16;

// Upper bounds of the histogram buckets. Stages: 10 us is a decode of a small request, 10 s a
// prompt of millions of tokens on a slow host.
inline constexpr double kStageBucketsSeconds[] = {1e-5,   2.5e-5, 5e-5, 1e-4,   2.5e-4, 5e-4, 1e-3,
                                                  2.5e-3, 5e-3,   1e-2, 2.5e-2, 5e-2,   0.1,  0.25,
                                                  0.5,    1,      2.5,  5,      10};
inline constexpr double kOverlapBuckets[] = {0.1, 0.2, 0.3, 0.4,  0.5,  0.6,
                                             0.7, 0.8, 0.9, 0.95, 0.99, 1};
inline constexpr double kKeptFractionBuckets[] = {0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3,
                                                  0.4,  0.5,  0.6,  0.7, 0.8,  0.9, 1};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_METRICS_METRIC_NAMES_H_
