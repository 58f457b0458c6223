#include "tests/tables/table_samples.h"

#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace keepset::tables {

std::string RawSafetensors(absl::string_view header, absl::string_view data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>((header.size() >> (8 * i)) & 0xff));
  return absl::StrCat(bytes, header, data);
}

absl::Span<const std::byte> AsBytes(absl::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> ParseRaw(absl::string_view header,
                                                          absl::string_view data) {
  return SafetensorsFile::Parse(AsBytes(RawSafetensors(header, data)), "raw");
}

ModelFingerprint SmallModel() {
  ModelFingerprint model;
  model.architecture = "llama";
  model.num_layers = 2;
  model.num_qo_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 8;
  return model;
}

CompilerKvTableContent SmallTable() {
  CompilerKvTableContent content;
  content.name = "small";
  content.version = "1";
  content.model = SmallModel();
  content.budgets = {256, 128};
  content.entropy_edges = {4.0f};
  content.ppl_edges = {10.0f};
  for (int b = 0; b < 2; ++b) {
    for (int l = 0; l < 2; ++l) {
      for (int h = 0; h < 4; ++h) {
        content.head_weights.push_back(0.8f + 0.1f * b + 0.05f * h + 0.2f * l);
      }
      for (int cell = 0; cell < 4; ++cell) {
        content.gate_thresholds.push_back(0.8f + 0.05f * l + 0.01f * cell);
      }
    }
  }
  content.provenance_json = R"({"source": "hand-written"})";
  return content;
}

LooseTable::LooseTable()
    : document(nlohmann::json::parse(R"({
        "format": "keepset.table", "format_version": 1, "kind": "compilerkv",
        "name": "loose", "version": "1",
        "model": {"architecture": "llama", "num_layers": 2, "num_qo_heads": 4,
                  "num_kv_heads": 2, "head_dim": 8},
        "provenance": {"source": "hand-written"}})")),
      head_weights(8, 1.0f),
      gate_thresholds(8, 0.9f),
      entropy_edges({4.0f}),
      ppl_edges({10.0f}) {}

std::string LooseTable::Bytes() const {
  std::vector<TensorToWrite> tensors;
  const auto add = [&](const std::string& name, TensorDType dtype, std::vector<int64_t> shape,
                       const auto& values) {
    if (name == left_out) return;
    tensors.push_back(
        {name, dtype, std::move(shape),
         absl::Span<const std::byte>(reinterpret_cast<const std::byte*>(values.data()),
                                     values.size() * sizeof(values[0]))});
  };
  const auto num_budgets = static_cast<int64_t>(budgets.size());
  std::vector<int64_t> head_shape = {static_cast<int64_t>(head_weights.size()) / 4, 4};
  std::vector<int64_t> gate_shape = {static_cast<int64_t>(gate_thresholds.size()) / 4, 2, 2};
  if (num_budgets > 0) {
    head_shape = {num_budgets, head_shape[0] / num_budgets, 4};
    gate_shape = {num_budgets, gate_shape[0] / num_budgets, 2, 2};
    add("budgets", TensorDType::kI64, {num_budgets}, budgets);
  }
  add("head_weights", TensorDType::kF32, head_shape, head_weights);
  add("gate_thresholds", TensorDType::kF32, gate_shape, gate_thresholds);
  add("entropy_edges", TensorDType::kF32, {static_cast<int64_t>(entropy_edges.size())},
      entropy_edges);
  add("ppl_edges", TensorDType::kF32, {static_cast<int64_t>(ppl_edges.size())}, ppl_edges);
  absl::StatusOr<std::string> bytes = SerializeSafetensors({{"keepset", document.dump()}}, tensors);
  KEEPSET_CHECK(bytes.ok());
  return *bytes;
}

absl::StatusOr<std::shared_ptr<const DecisionTable>> LooseTable::Parse() const {
  return ParseTable(AsBytes(Bytes()), "loose.safetensors");
}

TemporaryDirectory::TemporaryDirectory()
    : path_((std::filesystem::temp_directory_path() / "keepset-test-XXXXXX").string()) {
  KEEPSET_CHECK(::mkdtemp(path_.data()) != nullptr);
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TemporaryDirectory::Path(absl::string_view name) const {
  return absl::StrCat(path_, "/", name);
}

void WriteText(const std::string& path, absl::string_view text) {
  std::ofstream out(path, std::ios::binary);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
}

}  // namespace keepset::tables
