#include "clients/cli/remote_result_json.h"

#include <charconv>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <vector>

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

template <typename T>
Json OrNull(const std::optional<T>& value) {
  return value.has_value() ? Json(*value) : Json(nullptr);
}

// The shortest decimal that reads back as the same fp32, as the engine prints gates.
double ShortestDecimal(double fp32_value) {
  char text[64] = {};
  const std::to_chars_result end =
      std::to_chars(text, text + sizeof(text) - 1, static_cast<float>(fp32_value));
  return end.ec == std::errc() ? std::strtod(text, nullptr) : fp32_value;
}

// A number of a shared set, a list of per-head sets.
template <typename Count>
Json PerSet(const client::LayerResult& layer, client::Scope scope, Count count) {
  if (scope != client::Scope::kKvHead) return count(layer.sets.front());
  Json list = Json::array();
  for (const client::KeepSet& set : layer.sets) list.push_back(count(set));
  return list;
}

Json LayerJson(const client::OperationResult& result, const client::LayerResult& layer) {
  Json out;
  out["candidates"] = nullptr;
  out["kept"] = PerSet(layer, result.scope,
                       [](const client::KeepSet& set) { return set.keep_indices.size(); });
  out["filled"] = nullptr;
  if (result.has_candidates) {
    out["candidates"] =
        PerSet(layer, result.scope, [](const client::KeepSet& set) { return set.candidates; });
    out["filled"] =
        PerSet(layer, result.scope, [](const client::KeepSet& set) { return set.filled; });
  }
  out["tau"] = nullptr;
  if (result.has_candidates && layer.tau.has_value()) out["tau"] = ShortestDecimal(*layer.tau);
  if (layer.entropy.has_value()) out["entropy"] = *layer.entropy;
  if (layer.entropy_bin.has_value()) out["entropy_bin"] = *layer.entropy_bin;
  return out;
}

}  // namespace

std::string RemoteResultJson(const client::OperationResult& result) {
  Json table = nullptr;
  if (result.table.has_value()) {
    table = Json{{"name", result.table->name},
                 {"version", result.table->version},
                 {"digest", result.table->digest}};
  }
  Json layers = Json::array();
  for (const client::LayerResult& layer : result.layers) {
    layers.push_back(LayerJson(result, layer));
  }
  Json document = {{"format", "keepset.result"},
                   {"format_version", 1},
                   {"outcome", std::string(client::OutcomeName(result.outcome))},
                   {"reason", std::string(client::ReasonName(result.reason))},
                   {"policy", result.policy},
                   {"scope", std::string(client::ScopeName(result.scope))},
                   {"seq_len", result.seq_len},
                   {"table", table},
                   {"entropy", OrNull(result.entropy)},
                   {"ppl", OrNull(result.ppl)},
                   {"entropy_bin", OrNull(result.entropy_bin)},
                   {"ppl_bin", OrNull(result.ppl_bin)},
                   {"layers", layers},
                   {"defaulted_inputs", result.defaulted_inputs},
                   {"relaxed", result.relaxed},
                   {"backend", result.backend},
                   {"bytes_before", result.bytes_before},
                   {"bytes_after", result.bytes_after}};
  if (result.outside_mass.has_value()) document["outside_mass"] = *result.outside_mass;
  if (result.predicted_miss_rate.has_value()) {
    document["predicted_miss_rate"] = *result.predicted_miss_rate;
  }
  return document.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace keepset::cli
