#include "engine/result_json.h"

#include <string>

#include "gtest/gtest.h"

namespace keepset::engine {
namespace {

OperationResult Gated() {
  OperationResult result;
  result.policy = "compilerkv";
  result.scope = Scope::kLayerElastic;
  result.seq_len = 8;
  result.table = tables::TableIdentity{"sample", "1", "sha256:00"};
  result.entropy = 1.5;
  result.entropy_bin = 2;
  result.has_candidates = true;
  result.layers.resize(1);
  result.layers[0].keep_indices = {{1, 2, 7}};
  result.layers[0].candidates = {5};
  result.layers[0].filled = {0};
  result.layers[0].tau = 0.9f;
  result.relaxed = {"layer_match: 3 layers from 5"};
  result.backend = "cpu/avx2";
  result.bytes_before = 80;
  result.bytes_after = 30;
  return result;
}

TEST(ResultJson, WritesEveryKeyOfTheFormat) {
  EXPECT_EQ(ResultJson(Gated()),
            R"({"format":"keepset.result","format_version":1,"outcome":"compressed",)"
            R"("reason":"none","policy":"compilerkv","scope":"layer_elastic","seq_len":8,)"
            R"("table":{"name":"sample","version":"1","digest":"sha256:00"},"entropy":1.5,)"
            R"("ppl":null,"entropy_bin":2,"ppl_bin":null,"layers":[{"candidates":5,"kept":3,)"
            R"("filled":0,"tau":0.9}],"defaulted_inputs":[],)"
            R"("relaxed":["layer_match: 3 layers from 5"],"backend":"cpu/avx2",)"
            R"("bytes_before":80,"bytes_after":30})");
}

TEST(ResultJson, RankingPoliciesHaveNullThresholdFields) {
  OperationResult result = Gated();
  result.has_candidates = false;
  EXPECT_NE(ResultJson(result).find(R"([{"candidates":null,"kept":3,"filled":null,"tau":null}])"),
            std::string::npos);
}

TEST(ResultJson, KvHeadScopeListsCountsPerHeadEvenForOneHead) {
  OperationResult result = Gated();
  result.scope = Scope::kKvHead;
  EXPECT_NE(ResultJson(result).find(R"([{"candidates":[5],"kept":[3],"filled":[0],"tau":0.9}])"),
            std::string::npos);
}

TEST(ResultJson, LayerEntropyStandsInTheLayer) {
  OperationResult result = Gated();
  result.entropy.reset();
  result.entropy_bin.reset();
  result.layers[0].entropy = 1.25;
  result.layers[0].entropy_bin = 1;
  const std::string json = ResultJson(result);
  EXPECT_NE(json.find(R"("tau":0.9,"entropy":1.25,"entropy_bin":1})"), std::string::npos) << json;
  EXPECT_NE(json.find(R"("entropy":null,"ppl":null,"entropy_bin":null)"), std::string::npos);
}

TEST(ResultJson, PolicyWithoutTableHasANullTable) {
  OperationResult result = Gated();
  result.table.reset();
  EXPECT_NE(ResultJson(result).find(R"("table":null)"), std::string::npos);
}

}  // namespace
}  // namespace keepset::engine
