#include "tables/safetensors.h"

#include <sys/stat.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

void ExpectRefused(absl::string_view header, absl::string_view data, absl::string_view message) {
  const auto file = ParseRaw(header, data);
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument) << file.status();
  EXPECT_THAT(std::string(file.status().message()), HasSubstr(std::string(message)));
}

std::string OneTensor(absl::string_view dtype, absl::string_view shape, absl::string_view offsets) {
  return absl::StrCat(R"({"a":{"dtype":")", dtype, R"(","shape":)", shape, R"(,"data_offsets":)",
                      offsets, "}}");
}

TEST(SafetensorsReader, ReadsTensorsInAnyOrderFromAnUnpaddedHeader) {
  const std::string header = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},)"
                             R"("a":{"data_offsets":[0,4],"shape":[1],"dtype":"I32","note":1}})";
  const auto file = ParseRaw(header, absl::string_view("\x07\0\0\0\x09", 5));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->tensors()[0].name, "a");
  EXPECT_THAT(*ReadInts(**file, *(*file)->Find("a")), ElementsAre(7));
}

TEST(SafetensorsReader, ReadsUnalignedFloats) {
  const float value = 1.25f;
  std::string data(1, 'x');
  data.append(reinterpret_cast<const char*>(&value), sizeof(value));
  const auto file = ParseRaw(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})",
                             data);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT(*ReadFloats(**file, *(*file)->Find("b")), ElementsAre(1.25f));
}

TEST(SafetensorsReader, AcceptsTensorsWithoutElements) {
  const auto file = ParseRaw(R"({"a":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},)"
                             R"("b":{"dtype":"U8","shape":[],"data_offsets":[0,1]},)"
                             R"("c":{"dtype":"F32","shape":[0],"data_offsets":[1,1]}})",
                             "x");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->Find("a")->num_elements, 0);
  EXPECT_EQ((*file)->Find("b")->num_elements, 1);
}

TEST(SafetensorsReader, AcceptsAHeaderWithoutTensors) { EXPECT_TRUE(ParseRaw("{}", "").ok()); }

TEST(SafetensorsReader, RefusesAFileShorterThanTheLength) {
  const auto file = SafetensorsFile::Parse(AsBytes("1234567"), "raw");
  EXPECT_THAT(std::string(file.status().message()), HasSubstr("file_bytes=7"));
}

TEST(SafetensorsReader, RefusesAHeaderLongerThanTheFile) {
  std::string bytes = RawSafetensors("{}", "");
  bytes[0] = 3;
  const auto file = SafetensorsFile::Parse(AsBytes(bytes), "raw");
  EXPECT_THAT(std::string(file.status().message()), HasSubstr("header_bytes=3, want at most 2"));
}

TEST(SafetensorsReader, RefusesAHugeHeaderLength) {
  std::string bytes = RawSafetensors("{}", "");
  for (int i = 0; i < 8; ++i) bytes[i] = '\xff';
  const auto file = SafetensorsFile::Parse(AsBytes(bytes), "raw");
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(SafetensorsReader, RefusesTextThatIsNotJson) {
  ExpectRefused("{\"a\":", "", "not JSON");
  ExpectRefused("hello!", "", "does not begin with '{'");
  ExpectRefused("{} {}", "", "not JSON");
}

TEST(SafetensorsReader, RefusesDuplicateTensorNames) {
  ExpectRefused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                "x", "duplicate key \"a\"");
}

TEST(SafetensorsReader, RefusesDuplicateKeysInsideATensorEntry) {
  ExpectRefused(R"({"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", "x",
                "duplicate key \"dtype\"");
}

TEST(SafetensorsReader, RefusesNestingBombs) {
  ExpectRefused("{\"a\":" + std::string(200000, '['), "", "nested deeper");
}

TEST(SafetensorsReader, RefusesUnknownDTypes) {
  ExpectRefused(OneTensor("F31", "[1]", "[0,4]"), "xxxx", "dtype=F31");
}

TEST(SafetensorsReader, RefusesOffsetsThatDisagreeWithTheShape) {
  ExpectRefused(OneTensor("F32", "[2]", "[0,4]"), "xxxx", "data_offsets=[0,4]");
}

TEST(SafetensorsReader, RefusesOffsetsBeyondTheFile) {
  ExpectRefused(OneTensor("F32", "[2]", "[0,8]"), "xxxx", "at most 4");
}

TEST(SafetensorsReader, RefusesReversedAndNegativeOffsets) {
  ExpectRefused(OneTensor("U8", "[1]", "[1,0]"), "x", "data_offsets=[1,0]");
  ExpectRefused(OneTensor("U8", "[1]", "[-1,0]"), "x", "non-negative");
  ExpectRefused(OneTensor("U8", "[1]", "[0.0,1.0]"), "x", "non-negative");
}

TEST(SafetensorsReader, RefusesOverlappingTensors) {
  ExpectRefused(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                "xxx", "overlap");
}

TEST(SafetensorsReader, RefusesHoles) {
  ExpectRefused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                "xxx", "no holes");
}

TEST(SafetensorsReader, RefusesTrailingBytes) {
  ExpectRefused(OneTensor("U8", "[1]", "[0,1]"), "xy", "data_bytes=2");
}

TEST(SafetensorsReader, RefusesShapesThatOverflow) {
  ExpectRefused(OneTensor("F32", "[4294967296,4294967296]", "[0,0]"), "", "byte count below 2^63");
  ExpectRefused(OneTensor("F64", "[2305843009213693952]", "[0,0]"), "", "byte count below 2^63");
  ExpectRefused(OneTensor("U8", "[18446744073709551615]", "[0,0]"), "", "non-negative integers");
}

TEST(SafetensorsReader, RefusesMetadataThatIsNotStrings) {
  ExpectRefused(R"({"__metadata__":{"a":1}})", "", "__metadata__.a=1");
  ExpectRefused(R"({"__metadata__":[]})", "", "__metadata__");
}

TEST(SafetensorsReader, RefusesNaNAndInfinityWhenFloatsAreRead) {
  for (const char* bits : {"\x00\x00\xc0\x7f", "\x00\x00\x80\xff"}) {
    const auto file = ParseRaw(OneTensor("F32", "[1]", "[0,4]"), absl::string_view(bits, 4));
    ASSERT_TRUE(file.ok());
    EXPECT_THAT(std::string(ReadFloats(**file, (*file)->tensors()[0]).status().message()),
                HasSubstr("element[0]"));
  }
}

TEST(SafetensorsReader, WidensHalfPrecision) {
  // 1.5, the largest half, the smallest subnormal, minus zero.
  const uint16_t half[] = {0x3e00, 0x7bff, 0x0001, 0x8000};
  const auto file = ParseRaw(OneTensor("F16", "[4]", "[0,8]"),
                             absl::string_view(reinterpret_cast<const char*>(half), sizeof(half)));
  EXPECT_THAT(*ReadFloats(**file, (*file)->tensors()[0]),
              ElementsAre(1.5f, 65504.0f, 5.9604644775390625e-8f, -0.0f));
}

TEST(SafetensorsReader, WidensBFloat16) {
  const uint16_t brain[] = {0x3fc0, 0xc2f7};
  const auto file =
      ParseRaw(OneTensor("BF16", "[2]", "[0,4]"),
               absl::string_view(reinterpret_cast<const char*>(brain), sizeof(brain)));
  EXPECT_THAT(*ReadFloats(**file, (*file)->tensors()[0]), ElementsAre(1.5f, -123.5f));
}

TEST(SafetensorsReader, RefusesToReadOtherDTypesAsFloats) {
  const auto file = ParseRaw(OneTensor("U8", "[1]", "[0,1]"), "x");
  EXPECT_FALSE(ReadFloats(**file, (*file)->tensors()[0]).ok());
  EXPECT_FALSE(ReadInts(**file, (*file)->tensors()[0]).ok());
}

TEST(SafetensorsReader, ReportsAMissingFileAsNotFound) {
  TemporaryDirectory directory;
  const auto file = SafetensorsFile::Open(directory.Path("none"), ReadMode::kMap);
  EXPECT_EQ(file.status().code(), absl::StatusCode::kNotFound);
}

TEST(SafetensorsReader, RefusesWhatIsNotARegularFile) {
  TemporaryDirectory directory;
  ASSERT_EQ(::mkfifo(directory.Path("fifo").c_str(), 0600), 0);
  for (const std::string& path : {directory.path(), directory.Path("fifo")}) {
    for (const ReadMode mode : {ReadMode::kMap, ReadMode::kCopy}) {
      EXPECT_EQ(SafetensorsFile::Open(path, mode).status().code(),
                absl::StatusCode::kInvalidArgument);
    }
  }
}

TEST(SafetensorsReader, MappedAndCopiedFilesAreTheSame) {
  TemporaryDirectory directory;
  WriteText(directory.Path("f"), RawSafetensors(OneTensor("U8", "[1]", "[0,1]"), "x"));
  const auto mapped = SafetensorsFile::Open(directory.Path("f"), ReadMode::kMap);
  const auto copied = SafetensorsFile::Open(directory.Path("f"), ReadMode::kCopy);
  ASSERT_TRUE(mapped.ok() && copied.ok());
  EXPECT_EQ((*mapped)->Digest(), (*copied)->Digest());
  EXPECT_EQ((*mapped)->Find("a")->bytes[0], (*copied)->Find("a")->bytes[0]);
}

TEST(SafetensorsReader, RefusesAnEmptyFile) {
  TemporaryDirectory directory;
  WriteText(directory.Path("f"), "");
  for (const ReadMode mode : {ReadMode::kMap, ReadMode::kCopy}) {
    EXPECT_EQ(SafetensorsFile::Open(directory.Path("f"), mode).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST(SafetensorsReader, CopiedBytesOutliveARewriteInPlace) {
  TemporaryDirectory directory;
  WriteText(directory.Path("f"), RawSafetensors(OneTensor("U8", "[1]", "[0,1]"), "x"));
  const auto file = SafetensorsFile::Open(directory.Path("f"), ReadMode::kCopy);
  ASSERT_TRUE(file.ok());
  const std::string digest = (*file)->Digest();
  WriteText(directory.Path("f"), "");
  EXPECT_EQ((*file)->Find("a")->bytes[0], std::byte{'x'});
  EXPECT_EQ((*file)->Digest(), digest);
}

TEST(SafetensorsReader, DigestIsSha256OfTheWholeFile) {
  // sha256 of the ten bytes 02 00 00 00 00 00 00 00 '{' '}'.
  EXPECT_EQ((*ParseRaw("{}", ""))->Digest(),
            "sha256:411a485216e432ece6b9af94fa32154cf79a2a56d4f81266baa50063f45092bd");
}

TEST(SafetensorsWriter, RoundTripsTensorsAndMetadata) {
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const auto bytes = SerializeSafetensors(
      {{"keepset", "{\"a\": \"\\u00e9\"}"}},
      {{"x",
        TensorDType::kF32,
        {2, 3},
        AsBytes(absl::string_view(reinterpret_cast<const char*>(values.data()), 24))},
       {"empty", TensorDType::kI32, {0}, {}}});
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  const auto file = SafetensorsFile::Parse(AsBytes(*bytes), "written");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(*ReadFloats(**file, *(*file)->Find("x")), values);
  EXPECT_THAT((*file)->Find("x")->shape, ElementsAre(2, 3));
  EXPECT_EQ(*(*file)->metadata("keepset"), "{\"a\": \"\\u00e9\"}");
}

TEST(SafetensorsWriter, PadsTheHeaderToEightBytes) {
  const auto bytes = SerializeSafetensors({}, {{"abc", TensorDType::kU8, {1}, AsBytes("x")}});
  ASSERT_TRUE(bytes.ok());
  EXPECT_EQ((*bytes)[0] % 8, 0);
  EXPECT_EQ(bytes->size() % 8, 1);
}

TEST(SafetensorsWriter, RefusesBytesThatDisagreeWithTheShape) {
  EXPECT_FALSE(SerializeSafetensors({}, {{"a", TensorDType::kU8, {2}, AsBytes("x")}}).ok());
  EXPECT_FALSE(SerializeSafetensors({}, {{"a", TensorDType::kU8, {-1}, {}}}).ok());
}

TEST(SafetensorsWriter, RefusesDuplicateReservedAndUnencodableNames) {
  const TensorToWrite a = {"a", TensorDType::kU8, {1}, AsBytes("x")};
  EXPECT_FALSE(SerializeSafetensors({}, {a, a}).ok());
  EXPECT_FALSE(SerializeSafetensors({}, {{"__metadata__", TensorDType::kU8, {0}, {}}}).ok());
  EXPECT_FALSE(SerializeSafetensors({}, {{"\xff", TensorDType::kU8, {0}, {}}}).ok());
}

}  // namespace
}  // namespace keepset::tables
