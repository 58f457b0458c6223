#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tables/table_file.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

template <typename T>
std::string NpyBytes(absl::string_view descr, absl::string_view shape, const std::vector<T>& values,
                     absl::string_view fortran_order = "False", int version = 1) {
  const std::string header = absl::StrCat(
      "{'descr': '", descr, "', 'fortran_order': ", fortran_order, ", 'shape': ", shape, ", }\n");
  std::string bytes = "\x93NUMPY";
  bytes.push_back(static_cast<char>(version));
  bytes.push_back('\0');
  for (int i = 0; i < (version == 1 ? 2 : 4); ++i) {
    bytes.push_back(static_cast<char>((header.size() >> (8 * i)) & 0xff));
  }
  bytes += header;
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  return bytes;
}

// A valid directory of SmallModel() for budgets 128 and 256, 2 x 1 bins.
class ReferenceImport : public ::testing::Test {
 protected:
  ReferenceImport() {
    for (int i = 0; i < 16; ++i) heads_.push_back(0.8f + 0.025f * i);
    for (int i = 0; i < 8; ++i) gates_.push_back(0.8f + 0.01f * i);
    options_.name = "imported";
    options_.version = "1";
    options_.model = SmallModel();
  }

  absl::StatusOr<CompilerKvTableContent> Import() {
    WriteText(directory_.Path("manifest.json"), manifest_.dump());
    if (head_bytes_.empty()) head_bytes_ = NpyBytes("<f4", "(2, 2, 4)", heads_);
    if (gate_bytes_.empty()) gate_bytes_ = NpyBytes("<f4", "(2, 2, 2, 1)", gates_);
    WriteText(directory_.Path("W_head.npy"), head_bytes_);
    WriteText(directory_.Path("T_gate.npy"), gate_bytes_);
    return ImportReferenceDirectory(directory_.path(), options_);
  }
  void ExpectRefused(absl::StatusCode code, const std::string& message) {
    const auto content = Import();
    EXPECT_EQ(content.status().code(), code) << content.status();
    EXPECT_THAT(std::string(content.status().message()), HasSubstr(message));
  }

  TemporaryDirectory directory_;
  ImportOptions options_;
  std::vector<float> heads_;  // [2, 2, 4]
  std::vector<float> gates_;  // [2, 2, 2, 1]
  std::string head_bytes_;
  std::string gate_bytes_;
  nlohmann::json manifest_ = nlohmann::json::parse(R"({
      "format_version": 2, "source": "offline-calibration", "canonical_layers": 2, "num_heads": 4,
      "head_table": "W_head.npy", "gate_table": "T_gate.npy", "budget_values": [128, 256],
      "entropy_edges": [5.5], "ppl_edges": [], "algorithm": "horizon-1-cql",
      "cql": {"conservative_weight": 0.75}, "input_sha256": "abcd", "num_records": 7})");
};

TEST_F(ReferenceImport, RoundTripsThroughATableFile) {
  const auto content = Import();
  ASSERT_TRUE(content.ok()) << content.status();
  const auto table = ParseTable(AsBytes(*SerializeTable(*content)), "t");
  ASSERT_TRUE(table.ok()) << table.status();
  const CompilerKvTable& values = *(*table)->AsCompilerKv();
  EXPECT_THAT(values.budgets(), ElementsAre(128, 256));
  EXPECT_THAT(values.head_weights(), ::testing::ElementsAreArray(heads_));
  EXPECT_THAT(values.gate_thresholds(), ::testing::ElementsAreArray(gates_));
  EXPECT_THAT(values.entropy_edges(), ElementsAre(5.5f));
  const auto document = nlohmann::json::parse((*table)->metadata_json());
  EXPECT_EQ(document["provenance"]["source"], "offline-calibration");
  EXPECT_EQ(document["provenance"]["calibration_digest"], "sha256:abcd");
  EXPECT_EQ(document["algorithm"]["name"], "horizon-1-cql");
  EXPECT_EQ(document["algorithm"]["conservative_weight"], 0.75);
}

TEST_F(ReferenceImport, ReadsNpyVersionsTwoAndThree) {
  for (const int version : {2, 3}) {
    head_bytes_ = NpyBytes("<f4", "(2, 2, 4)", heads_, "False", version);
    const auto content = Import();
    ASSERT_TRUE(content.ok()) << content.status();
    EXPECT_EQ(content->head_weights, heads_);
  }
}

TEST_F(ReferenceImport, RoundsDoublesToF32) {
  const std::vector<double> doubles(heads_.begin(), heads_.end());
  head_bytes_ = NpyBytes("<f8", "(2, 2, 4)", doubles);
  const auto content = Import();
  ASSERT_TRUE(content.ok()) << content.status();
  EXPECT_EQ(content->head_weights, heads_);
}

TEST_F(ReferenceImport, TransposesFortranOrder) {
  std::vector<float> column_major(16);
  for (int b = 0; b < 2; ++b) {
    for (int l = 0; l < 2; ++l) {
      for (int h = 0; h < 4; ++h) {
        column_major[b + 2 * (l + 2 * h)] = heads_[(b * 2 + l) * 4 + h];
      }
    }
  }
  head_bytes_ = NpyBytes("<f4", "(2, 2, 4)", column_major, "True");
  const auto content = Import();
  ASSERT_TRUE(content.ok()) << content.status();
  EXPECT_EQ(content->head_weights, heads_);
}

TEST_F(ReferenceImport, ArraysWithoutBudgetAxisNeedAStatedBudget) {
  manifest_["budget_values"] = nullptr;
  head_bytes_ = NpyBytes("<f4", "(2, 4)", std::vector<float>(heads_.begin(), heads_.begin() + 8));
  gate_bytes_ =
      NpyBytes("<f4", "(2, 2, 1)", std::vector<float>(gates_.begin(), gates_.begin() + 4));
  ExpectRefused(kInvalid, "budget_values=null");
  options_.budget = 512;
  const auto content = Import();
  ASSERT_TRUE(content.ok()) << content.status();
  EXPECT_THAT(content->budgets, ElementsAre(512));
}

TEST_F(ReferenceImport, RefusesAStatedBudgetBesideTheDirectorysOwn) {
  options_.budget = 512;
  ExpectRefused(kInvalid, "stated budget=512");
}

TEST_F(ReferenceImport, RefusesABudgetAxisOnOneArrayOnly) {
  gate_bytes_ =
      NpyBytes("<f4", "(2, 2, 1)", std::vector<float>(gates_.begin(), gates_.begin() + 4));
  ExpectRefused(kInvalid, "W_head has 3 and T_gate 3 dimensions");
}

TEST_F(ReferenceImport, RefusesSourcesThatAreNotAllowed) {
  for (const char* source : {"simulated", "synthetic-paper-figure", "uniform", ""}) {
    manifest_["source"] = source;
    ExpectRefused(absl::StatusCode::kFailedPrecondition, "source=");
  }
}

TEST_F(ReferenceImport, RefusesOtherManifestVersions) {
  manifest_["format_version"] = 1;
  ExpectRefused(kInvalid, "format_version=1, want an integer in 2..2");
}

TEST_F(ReferenceImport, RefusesLayersAndHeadsOfAnotherModel) {
  manifest_["canonical_layers"] = 3;
  ExpectRefused(kInvalid, "canonical_layers=3, want 2");
  manifest_["canonical_layers"] = 2;
  manifest_["num_heads"] = 8;
  ExpectRefused(kInvalid, "num_heads=8, want 4");
}

TEST_F(ReferenceImport, RefusesArraysOfAnotherShape) {
  head_bytes_ = NpyBytes("<f4", "(2, 4, 2)", heads_);
  ExpectRefused(kInvalid, "W_head: shape=[2, 4, 2], want [2, 2, 4]");
}

TEST_F(ReferenceImport, RefusesObjectArrays) {
  head_bytes_ = NpyBytes("|O", "(2, 2, 4)", heads_);
  ExpectRefused(kInvalid, "descr=|O");
}

TEST_F(ReferenceImport, RefusesOtherElementTypes) {
  for (const char* descr : {">f4", "<f2", "<i4"}) {
    head_bytes_ = NpyBytes(descr, "(2, 2, 4)", heads_);
    ExpectRefused(kInvalid, "want <f4 or <f8");
  }
}

TEST_F(ReferenceImport, RefusesShapesThatDisagreeWithTheData) {
  for (const char* shape : {"(2, 2, 5)", "(4294967296, 4294967296, 4294967296)", "(0,)"}) {
    head_bytes_ = NpyBytes("<f4", shape, heads_);
    ExpectRefused(kInvalid, "data_bytes=64");
  }
}

TEST_F(ReferenceImport, RefusesHeadersThatAreNoPlainArray) {
  for (const char* shape : {"(2, 2, 4", "[2, 2, 4]", "(-2, 2, 4)", "(2, 2, 4), 'more': 1"}) {
    head_bytes_ = NpyBytes("<f4", shape, heads_);
    ExpectRefused(kInvalid, "header=");
  }
}

TEST_F(ReferenceImport, RefusesEveryTruncationOfAnArray) {
  const std::string whole = NpyBytes("<f4", "(2, 2, 4)", heads_);
  for (std::size_t size = 1; size < whole.size(); ++size) {
    head_bytes_ = whole.substr(0, size);
    ASSERT_EQ(Import().status().code(), kInvalid) << size;
  }
}

TEST_F(ReferenceImport, RefusesNaN) {
  heads_[3] = std::nanf("");
  ExpectRefused(kInvalid, "element[3]");
}

TEST_F(ReferenceImport, RefusesValuesOffTheGrid) {
  heads_[3] = 1.75f;
  ExpectRefused(kInvalid, "head_weights: element[3]=1.75");
}

TEST_F(ReferenceImport, TakesTheRangeOfAStatedActionGrid) {
  heads_[3] = 1.75f;
  manifest_["head_actions"] = {0.8, 1.0, 2.0};
  EXPECT_TRUE(Import().ok()) << Import().status();
}

TEST_F(ReferenceImport, AStatedActionGridHasRoomForStatesWithoutRecords) {
  for (float& weight : heads_) weight = 1.5f;
  for (float& gate : gates_) gate = 0.9f;
  heads_[0] = 1.0f;
  gates_[0] = 0.8f;
  manifest_["head_actions"] = {1.25, 1.5};
  manifest_["gate_actions"] = {0.85, 0.9, 1.0};
  const auto content = Import();
  ASSERT_TRUE(content.ok()) << content.status();
  EXPECT_EQ(content->head_grid, std::pair(1.0f, 1.5f));
  EXPECT_EQ(content->gate_grid, std::pair(0.8f, 1.0f));
}

TEST_F(ReferenceImport, RefusesActionsThatAreNoNumberOf32Bits) {
  manifest_["head_actions"] = {0.8, 1e39};
  ExpectRefused(kInvalid, "head_actions[1]=1e+39, want a finite number");
  manifest_.erase("head_actions");
  manifest_["gate_actions"] = {"0.8"};
  ExpectRefused(kInvalid, "gate_actions[0]=\"0.8\", want a finite number");
}

TEST_F(ReferenceImport, RefusesNamesThatLeadOutOfTheDirectory) {
  manifest_["head_table"] = "../W_head.npy";
  ExpectRefused(kInvalid, "head_table=");
}

TEST_F(ReferenceImport, RefusesDecreasingEdges) {
  manifest_["entropy_edges"] = {5.5};
  manifest_["ppl_edges"] = {9.0, 3.0};
  gates_.assign(2 * 2 * 2 * 3, 0.9f);
  gate_bytes_ = NpyBytes("<f4", "(2, 2, 2, 3)", gates_);
  ExpectRefused(kInvalid, "edges never decrease");
}

TEST_F(ReferenceImport, ReportsAMissingDirectory) {
  EXPECT_EQ(ImportReferenceDirectory(directory_.Path("none"), options_).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace keepset::tables
