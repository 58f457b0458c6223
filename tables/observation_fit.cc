#include "tables/observation_fit.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <map>
#include <numbers>
#include <string>
#include <utility>

#include "tables/run_on_threads.h"

namespace keepset::tables {
namespace {

constexpr int kRefitRounds = 200;
// Of the mean diagonal: keeps the refit of nearly equal observations from running away.
constexpr double kRidge = 1e-3;
// A gain below it is rounding.
constexpr double kLeastGain = 1e-9;

// Scores are binned by sign, exponent and two bits of the mantissa.
constexpr int kBinShift = 21;
// Below the OrderedBits of every finite score.
constexpr uint32_t kProtectedBits = 0;

// Zero padding counted, as the policy's pooling does.
void PoolAverage(int64_t kernel, std::vector<double>& row) {
  if (kernel == 1) return;
  const auto seq_len = static_cast<int64_t>(row.size());
  const std::vector<double> from = row;
  for (int64_t t = 0; t < seq_len; ++t) {
    double sum = 0.0;
    const int64_t end = std::min(seq_len, t + kernel / 2 + 1);
    for (int64_t s = std::max<int64_t>(0, t - kernel / 2); s < end; ++s) sum += from[s];
    row[t] = sum / static_cast<double>(kernel);
  }
}

void Standardize(const std::vector<bool>& is_protected, std::vector<double>& row) {
  double sum = 0.0;
  double squares = 0.0;
  double count = 0.0;
  for (size_t t = 0; t < row.size(); ++t) {
    if (is_protected[t]) continue;
    sum += row[t];
    count += 1.0;
  }
  const double mean = count > 0.0 ? sum / count : 0.0;
  for (size_t t = 0; t < row.size(); ++t) {
    if (!is_protected[t]) squares += (row[t] - mean) * (row[t] - mean);
  }
  const double deviation = count > 0.0 ? std::sqrt(squares / count) : 0.0;
  for (double& value : row) value = deviation > 0.0 ? (value - mean) / deviation : 0.0;
}

void Divide(const std::vector<bool>& is_protected, ObservationNormalization normalization,
            std::vector<double>& row) {
  double largest = 0.0;
  double sum = 0.0;
  for (size_t t = 0; t < row.size(); ++t) {
    if (is_protected[t]) continue;
    largest = std::max(largest, row[t]);
    sum += row[t];
  }
  const double divisor = normalization == ObservationNormalization::kSum ? sum : largest;
  for (double& value : row) value = divisor > 0.0 ? value / divisor : 0.0;
}

// Grows with the value, for every finite float.
uint32_t OrderedBits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value == 0.0f ? 0.0f : value);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

std::vector<float> Dilated(absl::Span<const float> scores, int64_t dilate) {
  std::vector<float> out(scores.begin(), scores.end());
  std::vector<float> before;
  const auto seq_len = static_cast<int64_t>(out.size());
  // Each pass joins two windows of maxima; the last one overlaps to end at the wanted width.
  for (int64_t width = 1; width <= dilate;) {
    const int64_t step = std::min(width, dilate + 1 - width);
    before = out;
    for (int64_t t = step; t < seq_len; ++t) out[t] = std::max(before[t], before[t - step]);
    width += step;
  }
  return out;
}

void AddColumn(const FitPrompt& prompt, int64_t candidate, double weight,
               std::vector<float>& scores) {
  const float* column = prompt.columns.data() + candidate * prompt.seq_len;
  const auto factor = static_cast<float>(weight);
  for (int64_t t = 0; t < prompt.seq_len; ++t) scores[t] += factor * column[t];
}

std::vector<float> ScoresOf(const FitPrompt& prompt, const Choice& choice) {
  std::vector<float> scores(prompt.seq_len, 0.0f);
  for (size_t i = 0; i < choice.candidates.size(); ++i) {
    AddColumn(prompt, choice.candidates[i], choice.weights[i], scores);
  }
  return scores;
}

void ScaleToOne(std::vector<double>& weights) {
  const double largest = *std::max_element(weights.begin(), weights.end());
  for (double& weight : weights) weight /= largest;
}

// Objective of adding each of `candidates` to the chosen ones with a weight, [candidate].
std::vector<double> TryCandidates(absl::Span<const FitPrompt> prompts,
                                  absl::Span<const int64_t> which, const Choice& chosen,
                                  double weight, absl::Span<const int64_t> candidates,
                                  const FitSettings& settings) {
  std::vector<std::vector<float>> base;
  for (const int64_t p : which) base.push_back(ScoresOf(prompts[p], chosen));
  const std::vector<double> shares = MixtureShares(prompts, which);
  std::vector<double> objective(candidates.size(), 0.0);
  std::atomic<size_t> next = 0;
  RunOnThreads(ThreadCount(settings.num_threads), [&](int) {
    for (size_t c = next++; c < candidates.size(); c = next++) {
      std::vector<double> recalls;
      for (size_t i = 0; i < which.size(); ++i) {
        std::vector<float> scores = base[i];
        AddColumn(prompts[which[i]], candidates[c], weight, scores);
        recalls.push_back(Recall(prompts[which[i]], scores, settings));
      }
      objective[c] = MixtureMean(shares, recalls);
    }
  });
  return objective;
}

}  // namespace

std::vector<double> RefitWeights(absl::Span<const FitPrompt> prompts,
                                 absl::Span<const int64_t> which,
                                 const std::vector<int64_t>& candidates) {
  const size_t count = candidates.size();
  std::vector<double> gram(count * count, 0.0);
  std::vector<double> target(count, 0.0);
  const std::vector<double> shares = MixtureShares(prompts, which);
  for (size_t w = 0; w < which.size(); ++w) {
    const FitPrompt& prompt = prompts[which[w]];
    const double share = shares[w] / static_cast<double>(prompt.seq_len);
    const double largest = *std::max_element(prompt.need.begin(), prompt.need.end());
    for (size_t i = 0; i < count; ++i) {
      const float* a = prompt.columns.data() + candidates[i] * prompt.seq_len;
      for (size_t j = 0; j <= i; ++j) {
        const float* b = prompt.columns.data() + candidates[j] * prompt.seq_len;
        double dot = 0.0;
        for (int64_t t = 0; t < prompt.seq_len; ++t) {
          if (!prompt.is_protected[t]) dot += static_cast<double>(a[t]) * b[t];
        }
        gram[i * count + j] += share * dot;
        if (i != j) gram[j * count + i] += share * dot;
      }
      double dot = 0.0;
      for (int64_t t = 0; t < prompt.seq_len; ++t) dot += a[t] * prompt.need[t] / largest;
      target[i] += share * dot;
    }
  }
  double trace = 0.0;
  for (size_t i = 0; i < count; ++i) trace += gram[i * count + i];
  const double ridge = kRidge * trace / static_cast<double>(count);
  std::vector<double> weights(count, 0.0);
  for (int round = 0; round < kRefitRounds; ++round) {
    for (size_t i = 0; i < count; ++i) {
      double rest = target[i];
      for (size_t j = 0; j < count; ++j) {
        if (j != i) rest -= gram[i * count + j] * weights[j];
      }
      const double diagonal = gram[i * count + i] + ridge;
      weights[i] = diagonal > 0.0 ? std::max(0.0, rest / diagonal) : 0.0;
    }
  }
  return weights;
}

std::vector<int64_t> Everyone(size_t count) {
  std::vector<int64_t> all(count);
  for (size_t i = 0; i < count; ++i) all[i] = static_cast<int64_t>(i);
  return all;
}

double MixtureMean(absl::Span<const double> shares, absl::Span<const double> values) {
  double sum = 0.0;
  for (size_t i = 0; i < values.size(); ++i) sum += shares[i] * values[i];
  return sum;
}

int64_t LengthClass(int64_t seq_len) {
  int64_t length = 1;
  // The middle of 2^k and 2^(k+1) in the logarithm is 2^k times the root of 2.
  while (static_cast<double>(seq_len) / static_cast<double>(length) >= std::numbers::sqrt2) {
    length *= 2;
  }
  return length;
}

std::vector<double> MixtureShares(absl::Span<const FitPrompt> prompts,
                                  absl::Span<const int64_t> which) {
  std::map<std::string, std::map<int64_t, double>> tasks;
  for (const int64_t p : which) tasks[prompts[p].task][LengthClass(prompts[p].seq_len)] += 1.0;
  std::vector<double> shares;
  for (const int64_t p : which) {
    const std::map<int64_t, double>& lengths = tasks.at(prompts[p].task);
    shares.push_back(1.0 / (static_cast<double>(tasks.size() * lengths.size()) *
                            lengths.at(LengthClass(prompts[p].seq_len))));
  }
  return shares;
}

FitPrompt PreparePrompt(const ObservationRecord& record, int64_t pool_kernel,
                        ObservationNormalization normalization) {
  FitPrompt prompt;
  prompt.task = record.task;
  prompt.seq_len = record.seq_len;
  prompt.is_protected.assign(record.seq_len, false);
  for (const LayerGroup& range : record.protected_ranges) {
    for (int64_t t = range.begin; t < range.end; ++t) prompt.is_protected[t] = true;
    prompt.num_protected += range.end - range.begin;
  }
  prompt.need.assign(record.need.begin(), record.need.end());
  for (int64_t t = 0; t < record.seq_len; ++t) {
    if (prompt.is_protected[t]) prompt.need[t] = 0.0;
    prompt.total_need += prompt.need[t];
  }
  prompt.columns.reserve(record.scores.size());
  for (size_t i = 0; i < record.candidates.size(); ++i) {
    const auto begin = record.scores.begin() + static_cast<int64_t>(i) * record.seq_len;
    std::vector<double> row(begin, begin + record.seq_len);
    if (record.candidates[i].rows == ObservedRows::kKeyNovelty) {
      Standardize(prompt.is_protected, row);
      PoolAverage(pool_kernel, row);
    } else {
      PoolAverage(pool_kernel, row);
      Divide(prompt.is_protected, normalization, row);
    }
    for (const double value : row) prompt.columns.push_back(static_cast<float>(value));
  }
  return prompt;
}

double Recall(const FitPrompt& prompt, absl::Span<const float> scores,
              const FitSettings& settings) {
  const std::vector<float> dilated = Dilated(scores, settings.dilate);
  const int64_t seq_len = prompt.seq_len;
  // This is what a fit spends its time on: the last score that is kept is sought among those of its
  // bin alone, and positions are gathered without branches.
  std::vector<uint32_t> bits(seq_len);
  std::array<int32_t, size_t{1} << (32 - kBinShift)> bins = {};
  for (int64_t t = 0; t < seq_len; ++t) {
    bits[t] = prompt.is_protected[t] ? kProtectedBits : OrderedBits(dilated[t]);
    ++bins[bits[t] >> kBinShift];
  }
  std::vector<uint32_t> same_bin(seq_len);
  std::vector<int32_t> kept(seq_len);
  double sum = 0.0;
  for (const int64_t budget : settings.budgets) {
    const int64_t wanted =
        std::clamp<int64_t>(budget - prompt.num_protected, 0, seq_len - prompt.num_protected);
    if (wanted == 0) continue;
    int64_t of_bin = wanted;
    uint32_t bin = bins.size() - 1;
    while (of_bin > bins[bin]) of_bin -= bins[bin--];
    int64_t count = 0;
    for (int64_t t = 0; t < seq_len; ++t) {
      same_bin[count] = bits[t];
      count += static_cast<int64_t>(bits[t] >> kBinShift == bin);
    }
    std::nth_element(same_bin.begin(), same_bin.begin() + (of_bin - 1), same_bin.begin() + count,
                     std::greater<>());
    const uint32_t last = same_bin[of_bin - 1];
    // Of its equals the first ones are kept.
    int64_t equals = of_bin - std::count_if(same_bin.begin(), same_bin.begin() + count,
                                            [last](uint32_t one) { return one > last; });
    int64_t num_kept = 0;
    for (int64_t t = 0; t < seq_len; ++t) {
      kept[num_kept] = static_cast<int32_t>(t);
      num_kept += static_cast<int64_t>(bits[t] > last);
      if (bits[t] == last && equals-- > 0) kept[num_kept++] = static_cast<int32_t>(t);
    }
    double found = 0.0;
    for (int64_t i = 0; i < num_kept; ++i) found += prompt.need[kept[i]];
    sum += found / prompt.total_need;
  }
  return sum / static_cast<double>(settings.budgets.size());
}

double Recall(const FitPrompt& prompt, const Choice& choice, const FitSettings& settings) {
  return Recall(prompt, ScoresOf(prompt, choice), settings);
}

double MeanRecall(absl::Span<const FitPrompt> prompts, absl::Span<const int64_t> which,
                  const Choice& choice, const FitSettings& settings) {
  std::vector<double> recalls;
  for (const int64_t p : which) recalls.push_back(Recall(prompts[p], choice, settings));
  return MixtureMean(MixtureShares(prompts, which), recalls);
}

std::vector<Choice> GreedyPath(absl::Span<const FitPrompt> prompts, absl::Span<const int64_t> which,
                               const FitSettings& settings) {
  std::vector<Choice> path;
  Choice chosen;
  double reached = 0.0;
  const FitPrompt& first = prompts[which[0]];
  std::vector<int64_t> candidates = Everyone(first.columns.size() / first.seq_len);
  std::vector<double> alone;  // objective of each candidate by itself
  double usual = 0.0;         // mean of `alone`
  while (static_cast<int64_t>(chosen.candidates.size()) < settings.max_heads) {
    double weight = 1.0;
    if (!chosen.weights.empty()) {
      weight = 0.0;
      for (const double one : chosen.weights) weight += one;
      weight /= static_cast<double>(chosen.weights.size());
    }
    if (candidates.empty()) break;
    const std::vector<double> objective =
        TryCandidates(prompts, which, chosen, weight, candidates, settings);
    if (alone.empty()) {
      alone = objective;
      for (const double one : alone) usual += one / static_cast<double>(alone.size());
    }
    auto best = std::max_element(objective.begin(), objective.end()) - objective.begin();
    if (objective[best] <= reached + kLeastGain) {
      if (chosen.candidates.empty()) break;
      best = -1;
      for (size_t i = 0; i < candidates.size(); ++i) {
        const double own = alone[candidates[i]];
        if (objective[i] < reached - kLeastGain || own <= usual) continue;
        if (best < 0 || own > alone[candidates[best]]) best = static_cast<int64_t>(i);
      }
      if (best < 0) break;
    }
    reached = objective[best];
    chosen.candidates.push_back(candidates[best]);
    std::erase(candidates, chosen.candidates.back());
    chosen.weights.push_back(weight);
    Choice refitted = chosen;
    refitted.weights = RefitWeights(prompts, which, chosen.candidates);
    if (*std::max_element(refitted.weights.begin(), refitted.weights.end()) > 0.0) {
      ScaleToOne(refitted.weights);
      const double value = MeanRecall(prompts, which, refitted, settings);
      if (value > reached + kLeastGain) {
        reached = value;
        chosen = refitted;
      }
    }
    ScaleToOne(chosen.weights);
    path.push_back(chosen);
  }
  return path;
}

}  // namespace keepset::tables
