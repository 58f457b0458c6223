// observation_heads against the definitions of docs/observation-heads.md in plain fp64 loops, its
// layers that may be left out, its risk gate, and what it refuses.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/input_needs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/observation_heads_table.h"
#include "tests/engine/oracle.h"
#include "tests/engine/run_operation.h"

namespace keepset::engine {
namespace {

using tables::HeadObservation;
using tables::ObservationSettings;
using tables::ObservedRows;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kBudget = 20;

// 3 layers, 4 query heads, 2 KV heads, 96 positions, 8 observed rows.
class ObservationHeadsTest : public ::testing::Test {
 protected:
  OperationSpec Spec() const {
    OperationSpec spec = prompt_.spec();
    spec.policy = "observation_heads";
    spec.budget = {Budget::Kind::kTokens, kBudget};
    spec.table = fakes::MakeObservationHeads(prompt_.model(), observations_, settings_);
    spec.protect_sink = 2;
    return spec;
  }

  // Layer by layer, those of `left_out` not at all.
  absl::StatusOr<OperationResult> Run(const OperationSpec& spec,
                                      const std::vector<int64_t>& left_out = {}) {
    KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation, bench_.Begin(spec));
    for (int64_t layer = 0; layer < prompt_.shape().num_layers; ++layer) {
      if (std::count(left_out.begin(), left_out.end(), layer) > 0) continue;
      KEEPSET_RETURN_IF_ERROR(operation->Observe(layer, prompt_.observation(layer)));
    }
    KEEPSET_ASSIGN_OR_RETURN(const OperationResult* result, operation->Finish());
    return *result;
  }

  void ExpectRefused(const OperationSpec& spec, absl::StatusCode code, const std::string& message) {
    const absl::Status status = Run(spec).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }

  fakes::SyntheticPrompt prompt_{fakes::PromptShape{}};
  std::vector<HeadObservation> observations_ = {{2, 0, ObservedRows::kMaxRows, 1.0f},
                                                {0, 3, ObservedRows::kLastRow, 0.5f},
                                                {0, 2, ObservedRows::kMeanRows, 0.75f},
                                                {0, 1, ObservedRows::kKeyNovelty, 0.1f}};
  ObservationSettings settings_;
  Bench bench_;
};

using Scores = std::vector<double>;

// Divides by the largest or the sum, or standardises, over positions from `first` on.
Scores Normalized(const Scores& values, int64_t first, const std::string& how) {
  const auto count = static_cast<double>(values.size() - first);
  const double sum = std::accumulate(values.begin() + first, values.end(), 0.0);
  double squares = 0.0;
  for (size_t t = first; t < values.size(); ++t) squares += std::pow(values[t] - sum / count, 2);
  Scores result;
  for (const double value : values) {
    if (how == "max") {
      result.push_back(value / *std::max_element(values.begin() + first, values.end()));
    } else if (how == "sum") {
      result.push_back(value / sum);
    } else {
      result.push_back((value - sum / count) / std::sqrt(squares / count));
    }
  }
  return result;
}

Scores Novelty(const fakes::SyntheticPrompt& prompt, int64_t layer, int64_t head) {
  const fakes::PromptShape& shape = prompt.shape();
  Scores mean(shape.head_dim, 0.0);
  const auto dot = [&](int64_t t, const std::function<double(int64_t)>& other) {
    double sum = 0.0;
    for (int64_t c = 0; c < shape.head_dim; ++c) sum += prompt.k(layer, head, t, c) * other(c);
    return sum;
  };
  Scores lengths;
  for (int64_t t = 0; t < shape.seq_len; ++t) {
    lengths.push_back(std::sqrt(dot(t, [&](int64_t c) { return prompt.k(layer, head, t, c); })));
    for (int64_t c = 0; c < shape.head_dim; ++c) {
      mean[c] += prompt.k(layer, head, t, c) / lengths[t];
    }
  }
  double length = 0.0;
  for (const double value : mean) length += value * value;
  Scores result;
  for (int64_t t = 0; t < shape.seq_len; ++t) {
    result.push_back(-dot(t, [&](int64_t c) { return mean[c]; }) /
                     (lengths[t] * std::sqrt(length)));
  }
  return result;
}

struct Asked {
  int64_t pool = 1;
  std::string merge = "sum";
  std::string normalization = "max";
  int64_t sink = 2;       // excluded from normalisation
  int64_t first_row = 0;  // observing rows, of those that are given
  int64_t end_row = 8;
  int64_t prompt_rows = 8;  // rows from here on are the probe's
  std::vector<int64_t> row_positions;
};

// Undilated scores of the observations whose layer passes.
Scores Oracle(const fakes::SyntheticPrompt& prompt,
              const std::vector<HeadObservation>& observations, const Asked& asked) {
  const int64_t seq_len = prompt.shape().seq_len;
  Scores total(seq_len, asked.merge == "max" ? -1e300 : 0.0);
  std::vector<int64_t> positions = asked.row_positions;
  if (positions.empty()) positions = oracle::LastRows(prompt);
  for (int64_t& position : positions) position = std::min(position, seq_len - 1);
  for (const HeadObservation& one : observations) {
    Scores values(seq_len, 0.0);
    if (one.rows == ObservedRows::kKeyNovelty) {
      values = oracle::AveragePool(
          Normalized(Novelty(prompt, one.layer, one.head), asked.sink, "standard"), asked.pool);
    } else {
      const oracle::Tile tile = oracle::Attention(prompt, one.layer, positions);
      int64_t begin = asked.first_row;
      int64_t end = asked.end_row;
      if (one.rows == ObservedRows::kLastRow) begin = (end = asked.prompt_rows) - 1;
      if (tables::NeedsProbeRows(one.rows)) {
        begin = asked.prompt_rows;
        end = prompt.shape().num_rows;
      }
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t t = 0; t < seq_len; ++t) {
          const double value = tile[one.head][i][t];
          const bool is_max =
              one.rows == ObservedRows::kMaxRows || one.rows == ObservedRows::kProbeMax;
          values[t] = is_max ? std::max(values[t], value)
                             : values[t] + value / static_cast<double>(end - begin);
        }
      }
      values = Normalized(oracle::AveragePool(values, asked.pool), asked.sink, asked.normalization);
    }
    for (int64_t t = 0; t < seq_len; ++t) {
      const double weighted = one.weight * values[t];
      total[t] = asked.merge == "max" ? std::max(total[t], weighted) : total[t] + weighted;
    }
  }
  return total;
}

Scores Dilated(const Scores& scores, int64_t dilate) {
  Scores result = scores;
  for (size_t t = 0; t < scores.size(); ++t) {
    for (int64_t j = 0; j <= dilate && j <= static_cast<int64_t>(t); ++j) {
      result[t] = std::max(result[t], scores[t - j]);
    }
  }
  return result;
}

// Protected sinks first, then the best.
void ExpectKept(const OperationResult& result, Scores scores) {
  scores[0] = scores[1] = 1e9;
  for (const LayerResult& layer : result.layers) {
    EXPECT_EQ(oracle::CheckKeepSet(layer.keep_indices.front(), scores, kBudget,
                                   -std::numeric_limits<double>::infinity()),
              "");
  }
}

TEST_F(ObservationHeadsTest, KeepsWhatTheOracleKeeps) {
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->scope, Scope::kSequence);
  ExpectKept(*result, Oracle(prompt_, observations_, {}));
}

TEST_F(ObservationHeadsTest, PoolsAndDividesBySums) {
  settings_.pool_kernel = 5;
  settings_.normalization = tables::ObservationNormalization::kSum;
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.pool = 5;
  asked.normalization = "sum";
  ExpectKept(*result, Oracle(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, MergesByMaximumBelowZeroToo) {
  settings_.merge = tables::ObservationMerge::kMax;
  observations_ = {{1, 0, ObservedRows::kKeyNovelty, 1.0f},
                   {2, 1, ObservedRows::kKeyNovelty, 2.0f}};
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.merge = "max";
  ExpectKept(*result, Oracle(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, AHitKeepsThePositionsAfterIt) {
  settings_.dilate = 3;
  observations_ = {{1, 2, ObservedRows::kLastRow, 1.0f}};
  OperationSpec spec = Spec();
  spec.budget.tokens = 6;
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  const Scores scores = Oracle(prompt_, observations_, {});
  const int64_t best = std::max_element(scores.begin() + 2, scores.end() - 4) - scores.begin();
  // The best position alone decides what follows it; at the end of the prompt less does.
  if (scores[best] >= *std::max_element(scores.end() - 4, scores.end())) {
    const auto begin = static_cast<int32_t>(best);
    EXPECT_THAT(result->layers[0].keep_indices[0],
                ElementsAre(0, 1, begin, begin + 1, begin + 2, begin + 3));
  }
}

TEST_F(ObservationHeadsTest, DilatesAsTheOracleDoes) {
  settings_.dilate = 2;
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  // Runs of equal scores straddle the cut: only scores strictly above it must be kept.
  const Scores dilated = Dilated(Oracle(prompt_, observations_, {}), 2);
  const std::vector<int32_t>& kept = result->layers[0].keep_indices[0];
  double worst = 1e300;
  for (const int32_t t : kept) worst = t < 2 ? worst : std::min(worst, dilated[t]);
  for (int32_t t = 2; t < 96; ++t) {
    if (dilated[t] > worst + oracle::kTolerance) {
      EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), t)) << t;
    }
  }
}

TEST_F(ObservationHeadsTest, ObserveChoosesTheRows) {
  OperationSpec spec = Spec();
  spec.parameters["observe"] = "90:93";
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.first_row = 2;
  asked.end_row = 5;
  ExpectKept(*result, Oracle(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, RowsOfAProbeSeeThePromptAndAreNotKept) {
  settings_.probe = tables::ObservationProbe{"recall", "What was said?"};
  observations_ = {{1, 1, ObservedRows::kProbeMax, 1.0f}, {1, 2, ObservedRows::kProbeMean, 1.0f}};
  OperationSpec spec = Spec();
  spec.parameters["probe"] = "recall";
  spec.row_positions = {90, 91, 92, 93, 96, 97, 98, 99};
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  Asked asked;
  asked.row_positions = spec.row_positions;
  asked.prompt_rows = 4;
  ExpectKept(*result, Oracle(prompt_, observations_, asked));
}

TEST_F(ObservationHeadsTest, LayerGroupsHaveSetsOfTheirOwn) {
  settings_.layer_groups = {{0, 2}, {2, 3}};
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->scope, Scope::kLayerEqual);
  const std::vector<HeadObservation> first = {observations_.begin() + 1, observations_.end()};
  OperationResult part = *result;
  part.layers = {result->layers[0], result->layers[1]};
  ExpectKept(part, Oracle(prompt_, first, {}));
  part.layers = {result->layers[2]};
  ExpectKept(part, Oracle(prompt_, {observations_[0]}, {}));
}

TEST_F(ObservationHeadsTest, ScopeSequenceMergesGroupsAsOftenAsTheyHaveLayers) {
  settings_.layer_groups = {{0, 2}, {2, 3}};
  OperationSpec spec = Spec();
  spec.scope = Scope::kSequence;
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  const Scores first = Oracle(prompt_, {observations_.begin() + 1, observations_.end()}, {});
  Scores merged = Oracle(prompt_, {observations_[0]}, {});
  for (size_t t = 0; t < merged.size(); ++t) merged[t] = (2 * first[t] + merged[t]) / 3;
  ExpectKept(*result, merged);
}

TEST_F(ObservationHeadsTest, WeightsOfZeroAreNotLookedAt) {
  observations_.push_back({1, 0, ObservedRows::kMaxRows, 0.0f});
  const auto result = Run(Spec(), /*left_out=*/{1});
  ASSERT_TRUE(result.ok()) << result.status();
}

TEST_F(ObservationHeadsTest, LayersTheTableDoesNotNameMayBeLeftOut) {
  const auto with = Run(Spec());
  const auto without = Run(Spec(), /*left_out=*/{1});
  ASSERT_TRUE(with.ok() && without.ok()) << without.status();
  EXPECT_EQ(with->layers[1].keep_indices, without->layers[1].keep_indices);
}

TEST_F(ObservationHeadsTest, NothingOfAnUnnamedLayerIsAskedFor) {
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(operation.ok());
  ASSERT_TRUE((*operation)->Observe(0, prompt_.observation(0)).ok());
  EXPECT_TRUE((*operation)->Observe(1, LayerObservation()).ok());
  EXPECT_TRUE((*operation)->Observe(2, prompt_.observation(2)).ok());
  EXPECT_TRUE((*operation)->Finish().ok());
}

TEST_F(ObservationHeadsTest, ALayerThatObservesAndIsNotSentIsNamed) {
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(operation.ok());
  EXPECT_THAT(std::string((*operation)->Observe(2, prompt_.observation(2)).message()),
              HasSubstr("layer 2: out of order, want layer 0"));
  ASSERT_TRUE((*operation)->Observe(0, prompt_.observation(0)).ok());
  const absl::Status status = (*operation)->Finish().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 2: not observed"));
}

TEST_F(ObservationHeadsTest, ALayerOfNoveltyAloneNeedsNoQueries) {
  observations_ = {{1, 0, ObservedRows::kKeyNovelty, 1.0f}};
  OperationSpec spec = Spec();
  spec.num_rows = 0;
  spec.softmax_scale = 0.0f;
  const auto operation = bench_.Begin(spec);
  ASSERT_TRUE(operation.ok()) << operation.status();
  LayerObservation keys;
  keys.k = prompt_.observation(1).k;
  EXPECT_TRUE((*operation)->Observe(1, keys).ok());
  EXPECT_TRUE((*operation)->Finish().ok());
}

TEST_F(ObservationHeadsTest, QueriesOfAnObservingLayerAreAskedFor) {
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(operation.ok());
  LayerObservation observation = prompt_.observation(0);
  observation.q_window = {};
  EXPECT_THAT(std::string((*operation)->Observe(0, observation).message()),
              HasSubstr("layer 0: missing q_window"));
}

TEST_F(ObservationHeadsTest, ARefusedLayerLeavesNoTrace) {
  const auto want = Run(Spec());
  const auto operation = bench_.Begin(Spec());
  ASSERT_TRUE(want.ok() && operation.ok());
  fakes::SyntheticPrompt bad = prompt_;
  bad.set_k(0, 1, 50, 0, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ((*operation)->Observe(0, bad.observation(0)).code(),
            absl::StatusCode::kInvalidArgument);
  for (const int64_t layer : {0, 2}) {
    ASSERT_TRUE((*operation)->Observe(layer, prompt_.observation(layer)).ok());
  }
  EXPECT_EQ((*(*operation)->Finish())->layers[0].keep_indices, want->layers[0].keep_indices);
}

TEST_F(ObservationHeadsTest, AnotherModelsTableIsRefused) {
  OperationSpec spec = Spec();
  spec.model.num_layers = 2;
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "num_layers");
}

TEST_F(ObservationHeadsTest, ATableOfAnotherKindIsRefused) {
  OperationSpec spec = Spec();
  spec.table = fakes::MakeTable(prompt_.model(), {});
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "want observation_heads");
}

TEST_F(ObservationHeadsTest, NoTableIsNotFound) {
  OperationSpec spec = Spec();
  spec.table = nullptr;
  ExpectRefused(spec, absl::StatusCode::kNotFound, "none given");
}

TEST_F(ObservationHeadsTest, ObservedRowsOutsideThePromptAreRefused) {
  OperationSpec spec = Spec();
  spec.parameters["observe"] = "90:97";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "inside the prompt of 96 positions");
}

TEST_F(ObservationHeadsTest, ARowOfTheSpanThatWasNotSentIsNamed) {
  OperationSpec spec = Spec();
  spec.parameters["observe"] = "80:92";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "observe=80:92: position 80 is not among row_positions");
}

TEST_F(ObservationHeadsTest, RowsTheTableNeedsAndNobodySentAreNamed) {
  OperationSpec spec = Spec();
  spec.num_rows = 0;
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "layer 0 head 2 observes mean_rows, want at least one observed row");
}

TEST_F(ObservationHeadsTest, RowsBehindThePromptNeedAProbeInTheTable) {
  OperationSpec spec = Spec();
  spec.row_positions = {90, 91, 92, 93, 94, 95, 96, 97};
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "row_positions[6]=96, want 0..95: table heads names no probe");
}

TEST_F(ObservationHeadsTest, AProbeThatIsNamedAndAbsentIsRefused) {
  settings_.probe = tables::ObservationProbe{"recall", "What was said?"};
  observations_[0].rows = ObservedRows::kProbeMax;
  OperationSpec spec = Spec();
  spec.parameters["probe"] = "recall";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument,
                "of probe recall, want rows of the probe");
}

TEST_F(ObservationHeadsTest, ProbeRowsSayWhichProbeTheyAre) {
  settings_.probe = tables::ObservationProbe{"recall", "What was said?"};
  observations_[0].rows = ObservedRows::kProbeMax;
  OperationSpec spec = Spec();
  spec.row_positions = {90, 91, 92, 93, 94, 95, 96, 97};
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want parameter probe=recall");
  spec.parameters["probe"] = "other";
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "table heads wants probe recall");
}

TEST_F(ObservationHeadsTest, UnknownParametersAreRefused) {
  OperationSpec spec = Spec();
  spec.parameters["kernel_size"] = "5";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "unknown parameter kernel_size");
}

TEST_F(ObservationHeadsTest, AMalformedObserveIsRefused) {
  for (const char* text : {"", "5", "5:5", "9:3", "-1:3", "a:b", "1:2:3"}) {
    OperationSpec spec = Spec();
    spec.parameters["observe"] = text;
    ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want BEGIN:END");
  }
}

TEST_F(ObservationHeadsTest, SaysWhatAWorkerMustSend) {
  const auto needs = DescribeNeeds(Spec(), bench_.policies());
  ASSERT_TRUE(needs.ok()) << needs.status();
  ASSERT_EQ(needs->layers.size(), 2u);
  EXPECT_EQ(needs->layers[0].layer, 0);
  EXPECT_THAT(needs->layers[0].qo_heads, ElementsAre(2, 3));
  EXPECT_THAT(needs->layers[0].kv_heads, ElementsAre(1));
  EXPECT_TRUE(needs->layers[0].queries && needs->layers[0].keys && !needs->layers[0].values);
  EXPECT_THAT(needs->layers[1].qo_heads, ElementsAre(0));
  EXPECT_TRUE(needs->last_row && needs->observed_rows && !needs->probe_rows);
}

TEST_F(ObservationHeadsTest, NeedsOfOtherPoliciesAreWholeLayers) {
  OperationSpec spec = Spec();
  spec.policy = "snapkv";
  const auto needs = DescribeNeeds(spec, bench_.policies());
  ASSERT_TRUE(needs.ok()) << needs.status();
  EXPECT_EQ(needs->layers.size(), 3u);
  EXPECT_THAT(needs->layers[0].qo_heads, IsEmpty());
  spec.policy = "streaming_llm";
  EXPECT_THAT(DescribeNeeds(spec, bench_.policies())->layers, IsEmpty());
}

class RiskGateTest : public ObservationHeadsTest {
 protected:
  RiskGateTest() {
    settings_.risk_curve = {{0.0, 0.0}, {1.0, 1.0}};
    observations_ = {{1, 2, ObservedRows::kMeanRows, 1.0f}};
  }

  // Share of the score outside `count` positions, the two protected ones first.
  double Outside(int64_t count) const {
    Scores scores = Oracle(prompt_, observations_, {});
    scores.erase(scores.begin(), scores.begin() + 2);
    std::sort(scores.rbegin(), scores.rend());
    const double inside = std::accumulate(scores.begin(), scores.begin() + count - 2, 0.0);
    return 1.0 - inside / std::accumulate(scores.begin(), scores.end(), 0.0);
  }
};

TEST_F(RiskGateTest, ThePredictedMissRateIsReadOffTheCurve) {
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_NEAR(*result->outside_mass, Outside(kBudget), 1e-5);
  EXPECT_NEAR(*result->predicted_miss_rate, Outside(kBudget), 1e-5);
  EXPECT_EQ(result->layers[0].keep_indices[0].size(), static_cast<size_t>(kBudget));
}

TEST_F(RiskGateTest, WithoutACurveNothingIsPredicted) {
  settings_.risk_curve.clear();
  const auto result = Run(Spec());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->predicted_miss_rate.has_value());
}

TEST_F(RiskGateTest, KeepsFewerWhenTheTargetAllows) {
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = absl::StrCat(Outside(12) + 1e-4);
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layers[0].keep_indices[0].size(), 12u);
  EXPECT_LE(*result->predicted_miss_rate, Outside(12) + 1e-4);
}

TEST_F(RiskGateTest, NeverMoreThanTheBudgetUnlessAskedTo) {
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = absl::StrCat(Outside(40) + 1e-4);
  EXPECT_EQ(Run(spec)->layers[0].keep_indices[0].size(), static_cast<size_t>(kBudget));
  spec.parameters["risk_max_tokens"] = "60";
  EXPECT_EQ(Run(spec)->layers[0].keep_indices[0].size(), 40u);
}

TEST_F(RiskGateTest, ATargetOutOfReachIsReportedAsItIs) {
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = "0";
  const auto result = Run(spec);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GT(*result->predicted_miss_rate, 0.0);
}

TEST_F(RiskGateTest, ATargetNeedsACurve) {
  settings_.risk_curve.clear();
  OperationSpec spec = Spec();
  spec.parameters["risk_target"] = "0.1";
  ExpectRefused(spec, absl::StatusCode::kFailedPrecondition, "has no risk curve");
}

TEST_F(RiskGateTest, ATargetOutOfRangeIsRefused) {
  for (const char* text : {"-0.1", "1.5", "nan", "much"}) {
    OperationSpec spec = Spec();
    spec.parameters["risk_target"] = text;
    ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want a number in 0..1");
  }
}

TEST_F(RiskGateTest, MostTokensNeedATarget) {
  OperationSpec spec = Spec();
  spec.parameters["risk_max_tokens"] = "60";
  ExpectRefused(spec, absl::StatusCode::kInvalidArgument, "want risk_target beside it");
}

}  // namespace
}  // namespace keepset::engine
