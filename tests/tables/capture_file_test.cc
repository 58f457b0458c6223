#include "tables/capture_file.h"

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

// A capture in parts: 1 layer, 2 query heads, 1 KV head, head_dim 2, T = 5, W = 3.
struct LooseCapture {
  struct Part {
    std::string name;
    TensorDType dtype;
    std::vector<int64_t> shape;
    std::string bytes;
  };
  nlohmann::json document = nlohmann::json::parse(R"({
    "format": "keepset.capture", "format_version": 1,
    "model": {"architecture": "llama", "num_layers": 1, "num_qo_heads": 2, "num_kv_heads": 1,
              "head_dim": 2},
    "seq_len": 5, "window": 3, "num_layers": 1, "num_qo_heads": 2, "num_kv_heads": 1,
    "head_dim": 2, "softmax_scale": 0.5, "ppl": 12.5,
    "spans": [{"name": "system", "begin": 0, "end": 2}]})");
  std::vector<Part> parts;

  LooseCapture() {
    Add("layers.0.q_window", TensorDType::kF32, {2, 3, 2});
    Add("layers.0.k", TensorDType::kBF16, {1, 5, 2});
    Add("layers.0.v", TensorDType::kBF16, {1, 5, 2});
  }

  void Add(const std::string& name, TensorDType dtype, const std::vector<int64_t>& shape) {
    int64_t bytes = TensorDTypeBytes(dtype);
    for (const int64_t dim : shape) bytes *= dim;
    parts.push_back({name, dtype, shape, std::string(bytes, '\0')});
  }
  template <typename T>
  void AddValues(const std::string& name, TensorDType dtype, const std::vector<T>& values) {
    parts.push_back(
        {name,
         dtype,
         {static_cast<int64_t>(values.size())},
         std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T))});
  }
  void Remove(const std::string& name) {
    std::erase_if(parts, [&](const Part& part) { return part.name == name; });
  }
  Part& Get(const std::string& name) {
    return *std::find_if(parts.begin(), parts.end(),
                         [&](const Part& part) { return part.name == name; });
  }
  std::string Bytes() const {
    std::vector<TensorToWrite> tensors;
    for (const Part& part : parts) {
      tensors.push_back({part.name, part.dtype, part.shape, AsBytes(part.bytes)});
    }
    return *SerializeSafetensors({{"keepset", document.dump()}}, tensors);
  }
  absl::StatusOr<std::unique_ptr<CaptureFile>> Parse() const {
    return CaptureFile::Parse(AsBytes(Bytes()), "c.safetensors");
  }
};

void ExpectRefused(const LooseCapture& capture, absl::string_view message) {
  const auto parsed = capture.Parse();
  EXPECT_EQ(parsed.status().code(), kInvalid) << parsed.status();
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(std::string(message)));
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr("c.safetensors"));
}

TEST(CaptureFile, ReadsWhatACaptureStates) {
  const auto capture = LooseCapture().Parse();
  ASSERT_TRUE(capture.ok()) << capture.status();
  const CaptureInfo& info = (*capture)->info();
  EXPECT_EQ(info.seq_len, 5);
  EXPECT_EQ(info.window, 3);
  EXPECT_EQ(info.softmax_scale, 0.5);
  EXPECT_EQ(info.ppl, 12.5);
  EXPECT_EQ(info.kv_dtype, TensorDType::kBF16);
  EXPECT_EQ(info.model.architecture, "llama");
  EXPECT_THAT(info.spans, ElementsAre(CaptureSpan{"system", 0, 2}));
  EXPECT_THAT(info.row_positions, IsEmpty());
  EXPECT_THAT(info.ignored, IsEmpty());
  ASSERT_EQ((*capture)->layers().size(), 1);
  EXPECT_THAT((*capture)->layers()[0].k.shape, ElementsAre(1, 5, 2));
  EXPECT_FALSE((*capture)->layers()[0].attn_tile.present());
}

TEST(CaptureFile, MayLeaveOutVersionPerplexityAndSpans) {
  LooseCapture capture;
  for (const char* key : {"format_version", "ppl", "spans"}) capture.document.erase(key);
  const auto parsed = capture.Parse();
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_FALSE((*parsed)->info().ppl.has_value());
}

TEST(CaptureFile, RefusesEachMissingField) {
  for (const char* key : {"format", "model", "seq_len", "window", "num_layers", "num_qo_heads",
                          "num_kv_heads", "head_dim", "softmax_scale"}) {
    LooseCapture capture;
    capture.document.erase(key);
    ExpectRefused(capture, absl::StrCat(key, "=(missing)"));
  }
}

TEST(CaptureFile, RefusesNewerVersions) {
  LooseCapture capture;
  capture.document["format_version"] = 2;
  EXPECT_EQ(capture.Parse().status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(CaptureFile, RefusesCountsThatAreNotPositive) {
  for (const char* key : {"seq_len", "window", "num_layers", "num_qo_heads", "head_dim"}) {
    LooseCapture capture;
    capture.document[key] = 0;
    ExpectRefused(capture, absl::StrCat(key, "=0"));
  }
}

TEST(CaptureFile, RefusesAWindowLongerThanThePrompt) {
  LooseCapture capture;
  capture.document["window"] = 6;
  ExpectRefused(capture, "window=6, want an integer in 1..5");
}

TEST(CaptureFile, RefusesModelCountsThatDisagree) {
  LooseCapture capture;
  capture.document["model"]["num_qo_heads"] = 4;
  ExpectRefused(capture, "model.num_qo_heads=4, want 2");
}

TEST(CaptureFile, RefusesScalesAndPerplexitiesThatAreNotPositive) {
  LooseCapture capture;
  capture.document["softmax_scale"] = 0;
  ExpectRefused(capture, "softmax_scale=0");
  LooseCapture other;
  other.document["ppl"] = -1;
  ExpectRefused(other, "ppl=-1");
}

TEST(CaptureFile, RefusesShapesThatDisagreeWithTheDocument) {
  LooseCapture capture;
  capture.Get("layers.0.k").shape = {5, 1, 2};
  ExpectRefused(capture, "layers.0.k: shape=[5, 1, 2], want [1, 5, 2]");
}

TEST(CaptureFile, RefusesOtherDTypes) {
  LooseCapture capture;
  capture.Remove("layers.0.q_window");
  capture.Add("layers.0.q_window", TensorDType::kF64, {2, 3, 2});
  ExpectRefused(capture, "dtype=F64, want F32, F16 or BF16");
}

TEST(CaptureFile, RefusesKeysAndValuesOfDifferentDTypes) {
  LooseCapture capture;
  capture.Remove("layers.0.v");
  capture.Add("layers.0.v", TensorDType::kF16, {1, 5, 2});
  ExpectRefused(capture, "v.dtype=F16, want BF16");
}

TEST(CaptureFile, NeedsQueriesWithKeysOrATile) {
  LooseCapture no_keys;
  no_keys.Remove("layers.0.k");
  ExpectRefused(no_keys, "layer 0 has neither");
  no_keys.Add("layers.0.attn_tile", TensorDType::kF32, {2, 3, 5});
  EXPECT_TRUE(no_keys.Parse().ok()) << no_keys.Parse().status();
}

TEST(CaptureFile, NeedsEveryLayer) {
  LooseCapture capture;
  capture.document["num_layers"] = 2;
  capture.document["model"]["num_layers"] = 2;
  ExpectRefused(capture, "layer 1 has neither");
}

TEST(CaptureFile, ValuesMayBeAbsent) {
  LooseCapture capture;
  capture.Remove("layers.0.v");
  EXPECT_TRUE(capture.Parse().ok());
}

TEST(CaptureFile, LogSumExpIsF32OrTheDTypeOfK) {
  for (const TensorDType dtype : {TensorDType::kF32, TensorDType::kBF16}) {
    LooseCapture capture;
    capture.Add("layers.0.window_lse", dtype, {2, 3});
    EXPECT_TRUE(capture.Parse().ok());
  }
  LooseCapture capture;
  capture.Add("layers.0.window_lse", TensorDType::kF16, {2, 3});
  ExpectRefused(capture, "window_lse.dtype=F16");
}

TEST(CaptureFile, ReadsRowPositionsIdsAndLogProbabilities) {
  LooseCapture capture;
  capture.AddValues<int32_t>("row_positions", TensorDType::kI32, {0, 2, 4});
  capture.AddValues<int64_t>("input_ids", TensorDType::kI64, {9, 8, 7, 6, 5});
  capture.AddValues<float>("window_logprobs", TensorDType::kF32, {-1.0f, -0.5f, -2.0f});
  const auto parsed = capture.Parse();
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT((*parsed)->info().row_positions, ElementsAre(0, 2, 4));
  EXPECT_THAT((*parsed)->info().input_ids, ElementsAre(9, 8, 7, 6, 5));
  EXPECT_THAT((*parsed)->info().window_logprobs, ElementsAre(-1.0f, -0.5f, -2.0f));
}

TEST(CaptureFile, RefusesRowPositionsThatDoNotAscendOrLieBeyondThePrompt) {
  for (const std::vector<int64_t>& rows :
       {std::vector<int64_t>{0, 2, 2}, {3, 2, 4}, {0, 1, 5}, {-1, 0, 1}}) {
    LooseCapture capture;
    capture.AddValues<int64_t>("row_positions", TensorDType::kI64, rows);
    ExpectRefused(capture, "row_positions: element[");
  }
}

TEST(CaptureFile, RefusesVectorsOfAnotherLength) {
  LooseCapture capture;
  capture.AddValues<float>("window_logprobs", TensorDType::kF32, {-1.0f});
  ExpectRefused(capture, "window_logprobs: shape=[1], want [3]");
}

TEST(CaptureFile, RefusesSpansOutsideThePrompt) {
  LooseCapture capture;
  capture.document["spans"][0]["end"] = 6;
  ExpectRefused(capture, "spans[0]: end=6");
  capture.document["spans"][0] = {{"name", "x"}, {"begin", 3}, {"end", 2}};
  ExpectRefused(capture, "spans[0]: end=2, want an integer in 3..5");
}

TEST(CaptureFile, FindsSpansByName) {
  const auto capture = LooseCapture().Parse();
  EXPECT_EQ((*capture)->FindSpan("system")->end, 2);
  const auto missing = (*capture)->FindSpan("other");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("system"));
}

TEST(CaptureFile, RefusesAnAmbiguousSpanName) {
  LooseCapture capture;
  capture.document["spans"].push_back({{"name", "system"}, {"begin", 3}, {"end", 4}});
  EXPECT_EQ((*capture.Parse())->FindSpan("system").status().code(), kInvalid);
}

TEST(CaptureFile, AlignsTensorsThatLieUnaligned) {
  LooseCapture capture;
  capture.parts.insert(capture.parts.begin(), {"odd", TensorDType::kU8, {1}, "x"});
  capture.Get("layers.0.q_window").bytes[5] = 'q';
  const auto parsed = capture.Parse();
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const CaptureTensor& queries = (*parsed)->layers()[0].q_window;
  EXPECT_EQ(reinterpret_cast<uintptr_t>(queries.bytes.data()) % 4, 0);
  EXPECT_EQ(queries.bytes[5], std::byte{'q'});
}

TEST(CaptureFile, ListsWhatItIgnores) {
  LooseCapture capture;
  capture.document["note"] = "x";
  capture.AddValues<int64_t>("extra", TensorDType::kI64, {1});
  capture.Add("layers.7.k", TensorDType::kF32, {1});
  EXPECT_THAT((*capture.Parse())->info().ignored,
              ElementsAre("key note", "tensor extra", "tensor layers.7.k"));
}

TEST(CaptureFile, RefusesEveryTruncation) {
  const std::string whole = LooseCapture().Bytes();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    ASSERT_EQ(CaptureFile::Parse(AsBytes(whole.substr(0, size)), "cut").status().code(), kInvalid)
        << size;
  }
}

TEST(CaptureFile, OpensAFile) {
  TemporaryDirectory directory;
  WriteText(directory.Path("c"), LooseCapture().Bytes());
  EXPECT_TRUE(CaptureFile::Open(directory.Path("c")).ok());
  EXPECT_EQ(CaptureFile::Open(directory.Path("none")).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace keepset::tables
