#include "tests/engine/observation_heads_test_support.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#include "base/status_macros.h"
#include "gmock/gmock.h"
#include "tests/engine/oracle.h"

namespace keepset::engine::testing {
namespace {

using tables::HeadObservation;
using tables::ObservedRows;
using ::testing::HasSubstr;

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

}  // namespace

OperationSpec ObservationHeadsTest::Spec() const {
  OperationSpec spec = prompt_.spec();
  spec.policy = "observation_heads";
  spec.budget = {Budget::Kind::kTokens, kBudget};
  spec.table = fakes::MakeObservationHeads(prompt_.model(), observations_, settings_);
  spec.protect_sink = 2;
  return spec;
}

absl::StatusOr<OperationResult> ObservationHeadsTest::Run(const OperationSpec& spec,
                                                          const std::vector<int64_t>& left_out) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<Operation> operation, bench_.Begin(spec));
  for (int64_t layer = 0; layer < prompt_.shape().num_layers; ++layer) {
    if (std::count(left_out.begin(), left_out.end(), layer) > 0) continue;
    KEEPSET_RETURN_IF_ERROR(operation->Observe(layer, prompt_.observation(layer)));
  }
  KEEPSET_ASSIGN_OR_RETURN(const OperationResult* result, operation->Finish());
  return *result;
}

void ObservationHeadsTest::ExpectRefused(const OperationSpec& spec, absl::StatusCode code,
                                         const std::string& message) {
  const absl::Status status = Run(spec).status();
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(message));
}

Scores ObservationScores(const fakes::SyntheticPrompt& prompt,
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

void ExpectKept(const OperationResult& result, Scores scores) {
  scores[0] = scores[1] = 1e9;
  for (const LayerResult& layer : result.layers) {
    EXPECT_EQ(oracle::CheckKeepSet(layer.keep_indices.front(), scores, kBudget,
                                   -std::numeric_limits<double>::infinity()),
              "");
  }
}

}  // namespace keepset::engine::testing
