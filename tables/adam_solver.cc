#include "tables/adam_solver.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "absl/numeric/int128.h"
#include "absl/types/span.h"

namespace keepset::tables {
namespace {

// Defaults of the optimiser the paper used.
constexpr double kBeta1 = 0.9;
constexpr double kBeta2 = 0.999;
constexpr double kEpsilon = 1e-8;

// Draws a state evenly, then one of its records: probability 1 / (num_states * count(state)).
class BalancedSampler {
 public:
  BalancedSampler(const std::vector<StateRow>& rows, int64_t num_states, uint64_t seed)
      : begin_(num_states + 1), order_(rows.size()), random_(seed) {
    for (const StateRow& row : rows) ++begin_[row.state + 1];
    for (int64_t state = 0; state < num_states; ++state) begin_[state + 1] += begin_[state];
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    for (std::size_t i = 0; i < rows.size(); ++i) order_[next[rows[i].state]++] = i;
  }

  std::size_t Next() {
    const int64_t state = Below(static_cast<int64_t>(begin_.size()) - 1);
    return order_[begin_[state] + Below(begin_[state + 1] - begin_[state])];
  }

 private:
  // The standard distributions differ between libraries. The bias of at most bound / 2^64 is none
  // that a table could show.
  int64_t Below(int64_t bound) {
    return static_cast<int64_t>(
        absl::Uint128High64(absl::uint128(random_()) * absl::uint128(bound)));
  }

  std::vector<int64_t> begin_;  // [num_states + 1], into order_
  std::vector<std::size_t> order_;
  std::mt19937_64 random_;
};

// Adds the gradient of one record's loss to its state's row.
void AddGradient(const StateRow& row, absl::Span<const double> q, double conservative_weight,
                 double share, absl::Span<double> gradient) {
  const double largest = *std::max_element(q.begin(), q.end());
  double sum = 0;
  for (const double value : q) sum += std::exp(value - largest);
  for (std::size_t a = 0; a < q.size(); ++a) {
    gradient[a] += share * conservative_weight * std::exp(q[a] - largest) / sum;
  }
  gradient[row.action] += share * (q[row.action] - row.reward - conservative_weight);
}

}  // namespace

FittedStates FitByAdam(const std::vector<StateRow>& rows, int64_t num_states, int num_actions,
                       double conservative_weight, const AdamOptions& options) {
  const int64_t size = num_states * num_actions;
  std::vector<double> q(size);
  std::vector<double> gradient(size);
  std::vector<double> first_moment(size);
  std::vector<double> second_moment(size);
  BalancedSampler sampler(rows, num_states, options.seed);
  const auto num_rows = static_cast<int64_t>(rows.size());
  double beta1_power = 1;
  double beta2_power = 1;
  for (int64_t epoch = 0; epoch < options.epochs; ++epoch) {
    for (int64_t drawn = 0; drawn < num_rows; drawn += options.batch_size) {
      const int64_t batch = std::min(options.batch_size, num_rows - drawn);
      std::fill(gradient.begin(), gradient.end(), 0.0);
      for (int64_t i = 0; i < batch; ++i) {
        const StateRow& row = rows[sampler.Next()];
        const int64_t begin = int64_t{row.state} * num_actions;
        AddGradient(row, absl::MakeConstSpan(q).subspan(begin, num_actions), conservative_weight,
                    1.0 / static_cast<double>(batch),
                    absl::MakeSpan(gradient).subspan(begin, num_actions));
      }
      beta1_power *= kBeta1;
      beta2_power *= kBeta2;
      const double step = options.learning_rate / (1 - beta1_power);
      const double second_scale = 1 / std::sqrt(1 - beta2_power);
      const double decay = 1 - options.learning_rate * options.weight_decay;
      for (int64_t i = 0; i < size; ++i) {
        first_moment[i] = kBeta1 * first_moment[i] + (1 - kBeta1) * gradient[i];
        second_moment[i] = kBeta2 * second_moment[i] + (1 - kBeta2) * gradient[i] * gradient[i];
        q[i] = q[i] * decay -
               step * first_moment[i] / (std::sqrt(second_moment[i]) * second_scale + kEpsilon);
      }
    }
  }
  FittedStates fitted;
  fitted.actions.resize(num_states);
  for (int64_t state = 0; state < num_states; ++state) {
    fitted.actions[state] =
        ArgMax(absl::MakeConstSpan(q).subspan(state * num_actions, num_actions));
  }
  fitted.q = std::move(q);
  return fitted;
}

}  // namespace keepset::tables
