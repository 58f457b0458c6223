#include "service/rpc/result_codec.h"

#include <gtest/gtest.h>

namespace keepset::service {
namespace {

engine::OperationResult TwoLayers() {
  engine::OperationResult result;
  result.policy = "snapkv";
  result.scope = engine::Scope::kKvHead;
  result.seq_len = 4;
  result.layers.resize(2);
  result.layers[0].keep_indices = {{1, 3}, {0, 1, 2, 3}};
  result.layers[0].candidates = {2, 4};
  result.layers[0].filled = {0, 1};
  result.layers[1].keep_indices = {{258}};
  return result;
}

TEST(EncodeResult, IndicesAreLittleEndianInt32) {
  v1::OperationResult wire;
  EncodeResult(TwoLayers(), &wire);
  EXPECT_EQ(wire.layers(1).sets(0).indices(), std::string("\x02\x01\x00\x00", 4));
  EXPECT_EQ(wire.layers(1).layer(), 1);
}

TEST(EncodeResult, SetOfAllPositionsTravelsWithoutIndices) {
  v1::OperationResult wire;
  EncodeResult(TwoLayers(), &wire);
  EXPECT_FALSE(wire.layers(0).sets(0).all());
  EXPECT_TRUE(wire.layers(0).sets(1).all());
  EXPECT_TRUE(wire.layers(0).sets(1).indices().empty());
  EXPECT_EQ(wire.layers(0).sets(1).kept(), 4);
  EXPECT_EQ(wire.layers(0).sets(1).filled(), 1);
}

TEST(EncodeResult, AbsentDiagnosticsStayAbsent) {
  v1::OperationResult wire;
  EncodeResult(TwoLayers(), &wire);
  EXPECT_FALSE(wire.has_table());
  EXPECT_FALSE(wire.has_entropy());
  EXPECT_FALSE(wire.layers(0).has_tau());
}

TEST(EncodeResult, EveryReasonHasItsName) {
  for (const engine::Reason reason :
       {engine::Reason::kNone, engine::Reason::kBelowBudget, engine::Reason::kNoSaving,
        engine::Reason::kShed, engine::Reason::kDeadline, engine::Reason::kDeviceFault}) {
    engine::OperationResult result = TwoLayers();
    result.reason = reason;
    v1::OperationResult wire;
    EncodeResult(result, &wire);
    EXPECT_EQ(static_cast<int>(wire.reason()), static_cast<int>(reason));
  }
}

TEST(KeptTokens, IsTheMeanOverHeadsSummedOverLayers) { EXPECT_EQ(KeptTokens(TwoLayers()), 3 + 1); }

}  // namespace
}  // namespace keepset::service
