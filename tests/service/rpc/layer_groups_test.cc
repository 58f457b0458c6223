#include "service/rpc/layer_groups.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <initializer_list>

namespace keepset::service {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

v1::OperationSpec Spec(uint32_t num_layers) {
  v1::OperationSpec spec;
  spec.mutable_model()->set_num_layers(num_layers);
  return spec;
}

v1::LayerGroup& Add(v1::OperationSpec& spec, std::initializer_list<uint32_t> layers,
                    v1::AttentionKind attention) {
  v1::LayerGroup& group = *spec.add_layer_groups();
  group.mutable_layers()->Add(layers.begin(), layers.end());
  group.set_attention(attention);
  return group;
}

// Layers 1 and 3 of four slide.
v1::OperationSpec Hybrid() {
  v1::OperationSpec spec = Spec(2);
  Add(spec, {0, 2}, v1::ATTENTION_KIND_FULL);
  v1::LayerGroup& sliding = Add(spec, {3, 1}, v1::ATTENTION_KIND_SLIDING_WINDOW);
  sliding.set_window(4096);
  sliding.set_left_out(true);
  return spec;
}

void ExpectInvalid(const v1::OperationSpec& spec, const std::string& message) {
  EXPECT_EQ(LayersLeftOut(spec).status(), absl::InvalidArgumentError(message));
}

TEST(LayersLeftOut, NoGroupsMeanFullAttentionEverywhere) {
  const auto left_out = LayersLeftOut(Spec(32));
  ASSERT_TRUE(left_out.ok()) << left_out.status();
  EXPECT_THAT(*left_out, IsEmpty());
}

TEST(LayersLeftOut, NamesTheLayersOfTheGroupsThatSaySo) {
  const auto left_out = LayersLeftOut(Hybrid());
  ASSERT_TRUE(left_out.ok()) << left_out.status();
  EXPECT_THAT(*left_out, ElementsAre(1, 3));
}

TEST(LayersLeftOut, AttentionThatIsNotCoveredIsRefusedUnlessLeftOut) {
  for (const v1::AttentionKind kind :
       {v1::ATTENTION_KIND_SLIDING_WINDOW, v1::ATTENTION_KIND_MLA, v1::ATTENTION_KIND_LINEAR}) {
    v1::OperationSpec spec = Spec(4);
    Add(spec, {0, 2}, v1::ATTENTION_KIND_FULL);
    v1::LayerGroup& group = Add(spec, {1, 3}, kind);
    if (kind == v1::ATTENTION_KIND_SLIDING_WINDOW) group.set_window(128);
    EXPECT_EQ(LayersLeftOut(spec).status(),
              absl::FailedPreconditionError(
                  "layer_groups[1]: layer 1 is of " + v1::AttentionKind_Name(kind) +
                  ", want it left_out: only full attention is compressed"));
    group.set_left_out(true);
    spec.mutable_model()->set_num_layers(2);
    EXPECT_TRUE(LayersLeftOut(spec).ok());
  }
}

TEST(LayersLeftOut, LayersOfFullAttentionMayBeLeftOut) {
  v1::OperationSpec spec = Spec(1);
  Add(spec, {1}, v1::ATTENTION_KIND_FULL);
  Add(spec, {0}, v1::ATTENTION_KIND_FULL).set_left_out(true);
  EXPECT_THAT(*LayersLeftOut(spec), ElementsAre(0));
}

TEST(LayersLeftOut, OtherNumberOfLayersThanTheModelIsRefused) {
  v1::OperationSpec spec = Hybrid();
  spec.mutable_model()->set_num_layers(4);
  ExpectInvalid(spec, "layer_groups: 2 layers take part, want model.num_layers=4");
}

TEST(LayersLeftOut, EachLayerIsInOneGroup) {
  v1::OperationSpec spec = Hybrid();
  spec.mutable_layer_groups(0)->set_layers(1, 3);
  ExpectInvalid(spec,
                "layer_groups: layer 2 is in no group, want each of the model's layers in one");
  spec.mutable_layer_groups(0)->set_layers(1, 1);
  ExpectInvalid(spec,
                "layer_groups: layer 1 is in two groups, want each of the model's layers in one");
}

TEST(LayersLeftOut, GroupStatesAKindAndAWindowWhereThereIsOne) {
  v1::OperationSpec spec = Hybrid();
  spec.mutable_layer_groups(1)->set_window(0);
  ExpectInvalid(spec, "layer_groups[1]: window=0, want the positions that a row sees");
  spec = Hybrid();
  spec.mutable_layer_groups(0)->set_window(7);
  ExpectInvalid(spec, "layer_groups[0]: window=7, want 0 without a sliding window");
  spec = Hybrid();
  spec.mutable_layer_groups(0)->clear_attention();
  ExpectInvalid(spec, "layer_groups[0]: attention=0, want 1..4");
  spec = Hybrid();
  spec.mutable_layer_groups(0)->clear_layers();
  ExpectInvalid(spec, "layer_groups[0]: no layers, want at least one");
}

}  // namespace
}  // namespace keepset::service
