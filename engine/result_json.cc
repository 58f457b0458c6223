#include "engine/result_json.h"

#include <charconv>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

#include "tables/result_file.h"

namespace keepset::engine {
namespace {

// The shortest decimal that reads back as the same fp32: a gate of 0.9 is printed as 0.9.
double ShortestDecimal(double fp32_value) {
  char text[64] = {};
  const std::to_chars_result end =
      std::to_chars(text, text + sizeof(text) - 1, static_cast<float>(fp32_value));
  return end.ec == std::errc() ? std::strtod(text, nullptr) : fp32_value;
}

}  // namespace

std::string ResultJson(const OperationResult& result) {
  tables::ResultDocument document;
  document.outcome = std::string(OutcomeName(result.outcome));
  document.reason = std::string(ReasonName(result.reason));
  document.policy = result.policy;
  document.scope = std::string(ScopeName(result.scope));
  document.seq_len = result.seq_len;
  document.table = result.table;
  document.entropy = result.entropy;
  document.ppl = result.ppl;
  document.entropy_bin = result.entropy_bin;
  document.ppl_bin = result.ppl_bin;
  document.outside_mass = result.outside_mass;
  document.predicted_miss_rate = result.predicted_miss_rate;
  for (const LayerResult& layer : result.layers) {
    tables::ResultLayer entry;
    for (const std::vector<int32_t>& set : layer.keep_indices) {
      entry.kept.push_back(static_cast<int64_t>(set.size()));
    }
    if (result.has_candidates) {
      entry.candidates = layer.candidates;
      entry.filled = layer.filled;
      if (layer.tau.has_value()) entry.tau = ShortestDecimal(*layer.tau);
    }
    entry.entropy = layer.entropy;
    entry.entropy_bin = layer.entropy_bin;
    document.layers.push_back(std::move(entry));
  }
  document.defaulted_inputs = result.defaulted_inputs;
  document.relaxed = result.relaxed;
  document.backend = result.backend;
  document.bytes_before = result.bytes_before;
  document.bytes_after = result.bytes_after;
  return tables::ResultJson(document);
}

}  // namespace keepset::engine
