#include "tests/engine/oracle.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "absl/strings/str_cat.h"

namespace keepset::oracle {

std::vector<int64_t> LastRows(const fakes::SyntheticPrompt& prompt) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < prompt.shape().num_rows; ++i) {
    rows.push_back(prompt.shape().seq_len - prompt.shape().num_rows + i);
  }
  return rows;
}

Tile Attention(const fakes::SyntheticPrompt& prompt, int64_t layer,
               const std::vector<int64_t>& row_positions) {
  const fakes::PromptShape& shape = prompt.shape();
  const int64_t group = shape.num_qo_heads / shape.num_kv_heads;
  Tile tile(shape.num_qo_heads, std::vector<std::vector<double>>(
                                    shape.num_rows, std::vector<double>(shape.seq_len, 0.0)));
  for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
    for (int64_t i = 0; i < shape.num_rows; ++i) {
      double sum = 0.0;
      for (int64_t t = 0; t <= row_positions[i]; ++t) {
        double dot = 0.0;
        for (int64_t c = 0; c < shape.head_dim; ++c) {
          dot += prompt.q(layer, h, i, c) * prompt.k(layer, h / group, t, c);
        }
        tile[h][i][t] = std::exp(dot * prompt.softmax_scale());
        sum += tile[h][i][t];
      }
      for (int64_t t = 0; t <= row_positions[i]; ++t) tile[h][i][t] /= sum;
    }
  }
  return tile;
}

namespace {

// Adds `share` of the attention of the layer's last `rows` rows, all heads, to alpha [T].
void AddAttention(const fakes::SyntheticPrompt& prompt, int64_t layer, int64_t rows, double share,
                  std::vector<double>* alpha) {
  const fakes::PromptShape& shape = prompt.shape();
  const Tile tile = Attention(prompt, layer, LastRows(prompt));
  for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
    for (int64_t i = shape.num_rows - rows; i < shape.num_rows; ++i) {
      for (int64_t t = 0; t < shape.seq_len; ++t) (*alpha)[t] += tile[h][i][t] * share;
    }
  }
}

double Entropy(const std::vector<double>& alpha) {
  double total = 0.0;
  for (const double a : alpha) total += a;
  double entropy = 0.0;
  for (const double a : alpha) {
    const double p = a / total;
    entropy -= p * std::log(std::max(p, 1e-8));
  }
  return entropy;
}

// The largest weighted utility over the layer's heads. [T]
std::vector<double> LayerScores(const fakes::SyntheticPrompt& prompt, int64_t layer,
                                const std::vector<double>& alpha,
                                const std::vector<float>& head_weights) {
  const fakes::PromptShape& shape = prompt.shape();
  const int64_t group = shape.num_qo_heads / shape.num_kv_heads;
  std::vector<double> scores(shape.seq_len, 0.0);
  for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
    std::vector<double> norms(shape.seq_len, 0.0);
    double mean = 0.0;
    for (int64_t t = 0; t < shape.seq_len; ++t) {
      for (int64_t c = 0; c < shape.head_dim; ++c) {
        norms[t] += prompt.v(layer, h / group, t, c) * prompt.v(layer, h / group, t, c);
      }
      norms[t] = std::sqrt(norms[t]);
      mean += norms[t] / static_cast<double>(shape.seq_len);
    }
    for (int64_t t = 0; t < shape.seq_len; ++t) {
      const double utility = alpha[t] * norms[t] / std::max(1e-8, mean);
      scores[t] = std::max(scores[t], head_weights[layer * shape.num_qo_heads + h] * utility);
    }
  }
  return scores;
}

}  // namespace

CompilerKv CompilerKvScores(const fakes::SyntheticPrompt& prompt,
                            const std::vector<float>& head_weights, int64_t window) {
  const fakes::PromptShape& shape = prompt.shape();
  const int64_t rows = std::min(window, shape.num_rows);
  const double share = static_cast<double>(shape.seq_len) /
                       static_cast<double>(rows * shape.num_layers * shape.num_qo_heads);
  std::vector<double> alpha(shape.seq_len, 0.0);
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    AddAttention(prompt, layer, rows, share, &alpha);
  }
  CompilerKv result;
  result.entropy = Entropy(alpha);
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    result.scores.push_back(LayerScores(prompt, layer, alpha, head_weights));
  }
  return result;
}

CompilerKv CompilerKvLayerAlphaScores(const fakes::SyntheticPrompt& prompt,
                                      const std::vector<float>& head_weights) {
  const fakes::PromptShape& shape = prompt.shape();
  const double share =
      static_cast<double>(shape.seq_len) / static_cast<double>(shape.num_rows * shape.num_qo_heads);
  CompilerKv result;
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    std::vector<double> alpha(shape.seq_len, 0.0);
    AddAttention(prompt, layer, shape.num_rows, share, &alpha);
    result.scores.push_back(LayerScores(prompt, layer, alpha, head_weights));
    result.entropy = Entropy(alpha);
  }
  return result;
}

std::vector<std::vector<double>> KnormScores(const fakes::SyntheticPrompt& prompt, int64_t layer) {
  const fakes::PromptShape& shape = prompt.shape();
  std::vector<std::vector<double>> scores(shape.num_kv_heads,
                                          std::vector<double>(shape.seq_len, 0.0));
  for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
    for (int64_t t = 0; t < shape.seq_len; ++t) {
      double squares = 0.0;
      for (int64_t c = 0; c < shape.head_dim; ++c) {
        squares += prompt.k(layer, g, t, c) * prompt.k(layer, g, t, c);
      }
      scores[g][t] = -std::sqrt(squares);
    }
  }
  return scores;
}

CompilerKv CompilerKvHeadAlphaScores(const fakes::SyntheticPrompt& prompt,
                                     const std::vector<float>& head_weights) {
  const fakes::PromptShape& shape = prompt.shape();
  const int64_t group = shape.num_qo_heads / shape.num_kv_heads;
  const double seq_len = static_cast<double>(shape.seq_len);
  CompilerKv result;
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    const Tile tile = Attention(prompt, layer, LastRows(prompt));
    std::vector<double> scores(shape.seq_len, 0.0);
    std::vector<double> mean_mass(shape.seq_len, 0.0);
    for (int64_t g = 0; g < shape.num_kv_heads; ++g) {
      std::vector<double> norms(shape.seq_len, 0.0);
      double mean_norm = 0.0;
      for (int64_t t = 0; t < shape.seq_len; ++t) {
        for (int64_t c = 0; c < shape.head_dim; ++c) {
          norms[t] += prompt.v(layer, g, t, c) * prompt.v(layer, g, t, c);
        }
        norms[t] = std::sqrt(norms[t]);
        mean_norm += norms[t] / seq_len;
      }
      for (int64_t t = 0; t < shape.seq_len; ++t) {
        double mass = 0.0;
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          for (int64_t i = 0; i < shape.num_rows; ++i) {
            mass += tile[h][i][t] / static_cast<double>(shape.num_rows * group);
          }
        }
        mean_mass[t] += mass / static_cast<double>(shape.num_kv_heads);
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          const double weight = head_weights[layer * shape.num_qo_heads + h];
          scores[t] = std::max(scores[t], weight * seq_len * mass * norms[t] / mean_norm);
        }
      }
    }
    result.entropy = 0.0;
    for (const double p : mean_mass) result.entropy -= p * std::log(std::max(p, 1e-8));
    result.scores.push_back(scores);
  }
  return result;
}

std::vector<double> AveragePool(const std::vector<double>& values, int64_t kernel_size) {
  const int64_t length = static_cast<int64_t>(values.size());
  std::vector<double> pooled(values.size(), 0.0);
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t j = t - kernel_size / 2; j <= t + kernel_size / 2; ++j) {
      if (j >= 0 && j < length) pooled[t] += values[j] / static_cast<double>(kernel_size);
    }
  }
  return pooled;
}

std::vector<std::vector<double>> SnapKvScores(const fakes::SyntheticPrompt& prompt, int64_t layer,
                                              int64_t kernel_size) {
  const fakes::PromptShape& shape = prompt.shape();
  const int64_t group = shape.num_qo_heads / shape.num_kv_heads;
  const int64_t prefix = shape.seq_len - shape.num_rows;
  const Tile tile = Attention(prompt, layer, LastRows(prompt));
  std::vector<std::vector<double>> scores(shape.num_kv_heads,
                                          std::vector<double>(shape.seq_len, 0.0));
  double largest = 0.0;
  for (int64_t h = 0; h < shape.num_qo_heads; ++h) {
    std::vector<double> mean(prefix, 0.0);
    for (int64_t t = 0; t < prefix; ++t) {
      for (int64_t i = 0; i < shape.num_rows; ++i) {
        mean[t] += tile[h][i][t] / static_cast<double>(shape.num_rows);
      }
    }
    for (int64_t t = 0; t < prefix; ++t) {
      for (int64_t j = t - kernel_size / 2; j <= t + kernel_size / 2; ++j) {
        if (j < 0 || j >= prefix) continue;
        scores[h / group][t] += mean[j] / static_cast<double>(kernel_size * group);
      }
    }
  }
  for (const std::vector<double>& head : scores) {
    for (const double score : head) largest = std::max(largest, score);
  }
  for (std::vector<double>& head : scores) {
    std::fill(head.begin() + prefix, head.end(), largest + 1.0);
  }
  return scores;
}

std::string CheckKeepSet(const std::vector<int32_t>& keep, const std::vector<double>& scores,
                         int64_t budget, double tau) {
  std::vector<double> sorted = scores;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const double budget_cut = sorted[std::min<int64_t>(budget, sorted.size()) - 1];
  const double cut = std::max(tau, budget_cut);
  const double tolerance = kTolerance * std::max(1e-3, std::abs(cut));
  if (static_cast<int64_t>(keep.size()) > budget) {
    return absl::StrCat(keep.size(), " positions exceed the budget of ", budget);
  }
  if (budget_cut >= tau + tolerance && static_cast<int64_t>(keep.size()) != budget) {
    return absl::StrCat(keep.size(), " positions, want the budget of ", budget);
  }
  std::vector<char> is_kept(scores.size(), 0);
  for (const int32_t t : keep) is_kept[t] = 1;
  for (size_t t = 0; t < scores.size(); ++t) {
    if (is_kept[t] && scores[t] < cut - tolerance) {
      return absl::StrCat("position ", t, " kept with score ", scores[t], " below ", cut);
    }
    if (!is_kept[t] && scores[t] > cut + tolerance) {
      return absl::StrCat("position ", t, " dropped with score ", scores[t], " above ", cut);
    }
  }
  return "";
}

}  // namespace keepset::oracle
