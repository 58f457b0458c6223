#include "service/rpc/result_codec.h"

#include <bit>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace keepset::service {
namespace {

static_assert(std::endian::native == std::endian::little,
              "keep indices are written as the host's int32");

v1::Outcome EncodeOutcome(engine::Outcome outcome) {
  switch (outcome) {
    case engine::Outcome::kCompressed:
      return v1::OUTCOME_COMPRESSED;
    case engine::Outcome::kKeptFull:
      return v1::OUTCOME_KEPT_FULL;
    case engine::Outcome::kShadow:
      return v1::OUTCOME_SHADOW;
  }
  return v1::OUTCOME_UNSPECIFIED;
}

v1::Reason EncodeReason(engine::Reason reason) {
  switch (reason) {
    case engine::Reason::kNone:
      return v1::REASON_NONE;
    case engine::Reason::kBelowBudget:
      return v1::REASON_BELOW_BUDGET;
    case engine::Reason::kNoSaving:
      return v1::REASON_NO_SAVING;
    case engine::Reason::kShed:
      return v1::REASON_SHED;
    case engine::Reason::kDeadline:
      return v1::REASON_DEADLINE;
    case engine::Reason::kDeviceFault:
      return v1::REASON_DEVICE_FAULT;
  }
  return v1::REASON_NONE;
}

v1::Scope EncodeScope(engine::Scope scope) {
  switch (scope) {
    case engine::Scope::kLayerElastic:
      return v1::SCOPE_LAYER_ELASTIC;
    case engine::Scope::kLayerEqual:
      return v1::SCOPE_LAYER_EQUAL;
    case engine::Scope::kSequence:
      return v1::SCOPE_SEQUENCE;
    case engine::Scope::kKvHead:
      return v1::SCOPE_KV_HEAD;
  }
  return v1::SCOPE_UNSPECIFIED;
}

}  // namespace

void EncodeLayer(int64_t layer, const engine::LayerResult& result, int64_t seq_len,
                 v1::LayerResult* wire) {
  wire->set_layer(static_cast<uint32_t>(layer));
  for (size_t i = 0; i < result.keep_indices.size(); ++i) {
    const std::vector<int32_t>& indices = result.keep_indices[i];
    v1::KeepSet* set = wire->add_sets();
    set->set_kept(indices.size());
    if (i < result.candidates.size()) set->set_candidates(result.candidates[i]);
    if (i < result.filled.size()) set->set_filled(result.filled[i]);
    if (static_cast<int64_t>(indices.size()) == seq_len) {
      set->set_all(true);
    } else {
      set->set_indices(indices.data(), indices.size() * sizeof(int32_t));
    }
  }
  if (result.tau.has_value()) wire->set_tau(*result.tau);
  if (result.entropy.has_value()) wire->set_entropy(*result.entropy);
  if (result.entropy_bin.has_value()) wire->set_entropy_bin(*result.entropy_bin);
}

void EncodeResult(const engine::OperationResult& result, v1::OperationResult* wire) {
  wire->set_outcome(EncodeOutcome(result.outcome));
  wire->set_reason(EncodeReason(result.reason));
  wire->set_policy(result.policy);
  wire->set_scope(EncodeScope(result.scope));
  wire->set_seq_len(result.seq_len);
  wire->set_budget_tokens(result.budget_tokens);
  if (result.table.has_value()) {
    wire->mutable_table()->set_name(result.table->name);
    wire->mutable_table()->set_version(result.table->version);
    wire->mutable_table()->set_digest(result.table->digest);
    wire->mutable_table()->set_source(result.table_source);
  }
  if (result.entropy.has_value()) wire->set_entropy(*result.entropy);
  if (result.ppl.has_value()) wire->set_ppl(*result.ppl);
  if (result.entropy_bin.has_value()) wire->set_entropy_bin(*result.entropy_bin);
  if (result.ppl_bin.has_value()) wire->set_ppl_bin(*result.ppl_bin);
  if (result.outside_mass.has_value()) wire->set_outside_mass(*result.outside_mass);
  if (result.predicted_miss_rate.has_value()) {
    wire->set_predicted_miss_rate(*result.predicted_miss_rate);
  }
  wire->set_has_candidates(result.has_candidates);
  wire->mutable_layers()->Reserve(static_cast<int>(result.layers.size()));
  for (size_t l = 0; l < result.layers.size(); ++l) {
    EncodeLayer(static_cast<int64_t>(l), result.layers[l], result.seq_len, wire->add_layers());
  }
  for (const std::string& name : result.defaulted_inputs) wire->add_defaulted_inputs(name);
  for (const std::string& text : result.relaxed) wire->add_relaxed(text);
  wire->set_backend(result.backend);
  wire->set_bytes_before(result.bytes_before);
  wire->set_bytes_after(result.bytes_after);
  v1::StageSeconds* stages = wire->mutable_stages();
  stages->set_score(absl::ToDoubleSeconds(result.times.score));
  stages->set_select(absl::ToDoubleSeconds(result.times.select));
  stages->set_gather(absl::ToDoubleSeconds(result.times.gather));
}

int64_t KeptTokens(const engine::OperationResult& result) {
  int64_t total = 0;
  for (const engine::LayerResult& layer : result.layers) {
    if (layer.keep_indices.empty()) continue;
    int64_t kept = 0;
    for (const std::vector<int32_t>& set : layer.keep_indices) {
      kept += static_cast<int64_t>(set.size());
    }
    total += kept / static_cast<int64_t>(layer.keep_indices.size());
  }
  return total;
}

}  // namespace keepset::service
