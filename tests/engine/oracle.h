// CompilerKV v2, SnapKV and Knorm once more, in plain fp64 loops over the definitions of
// methods.md.
#ifndef KEEPSET_TESTS_ENGINE_ORACLE_H_
#define KEEPSET_TESTS_ENGINE_ORACLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "tests/fakes/synthetic_prompt.h"

namespace keepset::oracle {

// The window as a matrix: softmax over all visible positions. [H][W][T]
using Tile = std::vector<std::vector<std::vector<double>>>;
Tile Attention(const fakes::SyntheticPrompt& prompt, int64_t layer,
               const std::vector<int64_t>& row_positions);
std::vector<int64_t> LastRows(const fakes::SyntheticPrompt& prompt);

struct CompilerKv {
  std::vector<std::vector<double>> scores;  // [L][T]
  double entropy = 0.0;
};
// `window` rows at most; head_weights [L * H].
CompilerKv CompilerKvScores(const fakes::SyntheticPrompt& prompt,
                            const std::vector<float>& head_weights, int64_t window);
// alpha_scope layer: every layer's own attention. Entropy is the last layer's.
CompilerKv CompilerKvLayerAlphaScores(const fakes::SyntheticPrompt& prompt,
                                      const std::vector<float>& head_weights);
// alpha_scope head: every KV head weighs its own attention. Entropy is the last layer's.
CompilerKv CompilerKvHeadAlphaScores(const fakes::SyntheticPrompt& prompt,
                                     const std::vector<float>& head_weights);

// Stride 1, zero padding counted.
std::vector<double> AveragePool(const std::vector<double>& values, int64_t kernel_size);

// [Hkv][T]; the observed positions hold the maximum plus one.
std::vector<std::vector<double>> SnapKvScores(const fakes::SyntheticPrompt& prompt, int64_t layer,
                                              int64_t kernel_size);

// Negative norms of the keys. [Hkv][T]
std::vector<std::vector<double>> KnormScores(const fakes::SyntheticPrompt& prompt, int64_t layer);

// Empty when `keep` is what `budget` and `tau` ask of `scores`, else what is wrong. Positions whose
// score lies within kTolerance of the cut may fall on either side.
inline constexpr double kTolerance = 1e-5;
std::string CheckKeepSet(const std::vector<int32_t>& keep, const std::vector<double>& scores,
                         int64_t budget, double tau);

}  // namespace keepset::oracle

#endif  // KEEPSET_TESTS_ENGINE_ORACLE_H_
