// Keeps docs/metrics.md true. `metrics_page_test --update` rewrites the page from metric_names.h.
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "engine/operation_types.h"
#include "gtest/gtest.h"
#include "service/metrics/metric_names.h"
#include "service/metrics/metrics.h"
#include "tests/service/metrics/exposition_page.h"

namespace keepset::service {
namespace {

constexpr char kPagePath[] = KEEPSET_SOURCE_DIR "/docs/metrics.md";

absl::string_view TypeName(MetricType type) {
  switch (type) {
    case MetricType::kCounter:
      return "counter";
    case MetricType::kGauge:
      return "gauge";
    case MetricType::kHistogram:
      return "histogram";
  }
  return "";
}

std::string Code(absl::string_view text) {
  return text.empty() ? "" : absl::StrCat("`", absl::StrReplaceAll(text, {{",", "`, `"}}), "`");
}

template <typename Values>
std::string ValueRow(absl::string_view label, const Values& values) {
  return absl::StrCat("| `", label, "` | `", absl::StrJoin(values, "`, `"), "`, `other` |\n");
}

std::string WantedPage() {
  std::string page = absl::StrCat(
      "# Metrics\n\n",
      "Written from `service/metrics/metric_names.h` by `metrics_page_test --update`; a test fails "
      "when the two differ.\n\n",
      "`keepsetd` serves these series at `/metrics` on `--metrics-listen`, in Prometheus text "
      "format. All exist from the start, with value 0; the exceptions are the series whose "
      "labels follow the active tables. The listener adds its own `exposer_*` "
      "series to the page it serves.\n\n",
      "| name | type | labels | meaning |\n|---|---|---|---|\n");
  for (const MetricInfo& info : kAllMetrics) {
    absl::StrAppend(&page, "| `", info.name, "` | ", TypeName(info.type), " | ", Code(info.labels),
                    " | ", info.help, " |\n");
  }
  absl::StrAppend(
      &page, "\n## Label values\n\n",
      "A value outside these sets counts as `other`, so no label grows with traffic.\n\n",
      "| label | values |\n|---|---|\n");
  for (absl::string_view outcome : kOutcomes) {
    std::vector<absl::string_view> of_outcome;
    for (const OutcomeReason& pair : kOutcomeReasons) {
      if (pair.outcome == outcome) of_outcome.push_back(pair.reason);
    }
    absl::StrAppend(&page, ValueRow(absl::StrCat("reason` of outcome `", outcome), of_outcome));
  }
  std::vector<absl::string_view> inputs;
  for (engine::DefaultedInput input : engine::kDefaultedInputs) {
    inputs.push_back(engine::DefaultedInputName(input));
  }
  absl::StrAppend(
      &page, ValueRow("outcome", kOutcomes),
      absl::StrCat("| `stage` | `", absl::StrJoin(kStageValues, "`, `"), "` |\n"),
      ValueRow("input", inputs), ValueRow("result` of `keepset_table_reloads_total", kReloadValues),
      ValueRow("reason` of `keepset_sessions_ended_total", kSessionEndValues),
      ValueRow("reason` of `keepset_rejected_total", kRejectValues),
      ValueRow("result` of `keepset_shadow_operations_total", kShadowValues),
      ValueRow("state` of `keepset_device_workspace_bytes", kWorkspaceValues),
      "| `policy` | the policies of this build, `unknown` for any other that a request names, "
      "`other` |\n",
      "| `kind` | the memory transports of this build, `other` |\n",
      "| `source` | the table sources of this build, `upload`, `other` |\n",
      absl::StrCat("| `model` | architectures of active tables (at most ", kMaxModelValues,
                   "), `other` |\n"),
      absl::StrCat("| `entropy_bin`, `ppl_bin` | bins of the active tables' grids (at most ",
                   kMaxEntropyBins, " and ", kMaxPplBins, "), `other` for cells beyond |\n"),
      "\nBuckets in seconds: ", absl::StrJoin(kStageBucketsSeconds, ", "),
      ". Buckets of `keepset_kept_fraction`: ", absl::StrJoin(kKeptFractionBuckets, ", "),
      ". Buckets of `keepset_shadow_kept_overlap`: ", absl::StrJoin(kOverlapBuckets, ", "), ".\n");
  return page;
}

std::string ReadPage() {
  std::ifstream file(kPagePath);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

TEST(MetricsDocument, EqualsTheListOfNames) {
  EXPECT_EQ(ReadPage(), WantedPage()) << "run metrics_page_test --update";
}

TEST(MetricsDocument, NamesWhatAFreshServerExportsAndNothingElse) {
  const auto metrics =
      Metrics::New({"0.1.0", "cpu/scalar"}, {{"full"}, {"memfd"}, {"ppl"}, {"directory"}});
  const ExpositionPage exported = ParsePage(metrics->Render());
  std::set<std::string> documented;
  std::istringstream lines(ReadPage());
  for (std::string line; std::getline(lines, line);) {
    const std::vector<std::string> cells = absl::StrSplit(line, " | ");
    if (cells.size() != 4 || cells[0].rfind("| `keepset_", 0) != 0) continue;
    const std::string name = cells[0].substr(3, cells[0].size() - 4);
    documented.insert(name);
    ASSERT_TRUE(exported.families.contains(name)) << name;
    EXPECT_EQ(exported.families.at(name).type, cells[1]) << name;
  }
  std::set<std::string> names;
  for (const auto& [name, family] : exported.families) names.insert(name);
  EXPECT_EQ(names, documented);
}

}  // namespace
}  // namespace keepset::service

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--update") {
    std::ofstream file(keepset::service::kPagePath, std::ios::trunc);
    file << keepset::service::WantedPage();
    file.close();
    if (!file.good()) {
      std::fprintf(stderr, "%s: cannot be written\n", keepset::service::kPagePath);
      return 1;
    }
    return 0;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
