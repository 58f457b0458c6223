#include "service/rpc/short_operation.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

namespace keepset::service {
namespace {

// One layer of the 8B shape, one observed row.
v1::OperationSpec Spec(uint64_t seq_len) {
  v1::OperationSpec spec;
  v1::ModelFingerprint& model = *spec.mutable_model();
  model.set_num_layers(1);
  model.set_num_qo_heads(32);
  model.set_num_kv_heads(8);
  model.set_head_dim(128);
  spec.set_seq_len(seq_len);
  spec.set_num_rows(1);
  return spec;
}

const kernels::DeviceInfo kHost;

TEST(ShortOperation, OneLayerOfAFewHundredTokensIsShort) { EXPECT_TRUE(IsShort(Spec(256), kHost)); }

TEST(ShortOperation, LengthLayersAndRowsCount) {
  EXPECT_FALSE(IsShort(Spec(4096), kHost));
  v1::OperationSpec layers = Spec(256);
  layers.mutable_model()->set_num_layers(32);
  EXPECT_FALSE(IsShort(layers, kHost));
  v1::OperationSpec rows = Spec(256);
  rows.set_num_rows(64);
  EXPECT_FALSE(IsShort(rows, kHost));
}

TEST(ShortOperation, ALongPromptOfATinyModelIsNotShort) {
  v1::OperationSpec spec;
  spec.set_seq_len(1 << 20);
  EXPECT_FALSE(IsShort(spec, kHost));
}

TEST(ShortOperation, AbsurdSizesAreNotShort) {
  v1::OperationSpec spec = Spec(std::numeric_limits<uint64_t>::max());
  spec.set_num_rows(std::numeric_limits<uint64_t>::max());
  spec.mutable_model()->set_num_layers(std::numeric_limits<uint32_t>::max());
  EXPECT_FALSE(IsShort(spec, kHost));
}

TEST(ShortOperation, WorkOfADeviceIsNeverShort) {
  kernels::DeviceInfo device;
  device.uuid = "GPU-1";
  EXPECT_FALSE(IsShort(Spec(256), device));
}

TEST(ShortOperation, LongListsAreNeverShort) {
  v1::OperationSpec spans = Spec(256);
  for (int i = 0; i < 1025; ++i) spans.add_protect_spans();
  EXPECT_FALSE(IsShort(spans, kHost));
  v1::OperationSpec rope = Spec(256);
  rope.mutable_model()->set_rope_json(std::string(8192, ' '));
  EXPECT_FALSE(IsShort(rope, kHost));
}

TEST(ShortOperation, AShadowTableIsNeverShort) {
  v1::OperationSpec spec = Spec(256);
  spec.mutable_shadow_table();
  EXPECT_FALSE(IsShort(spec, kHost));
}

}  // namespace
}  // namespace keepset::service
