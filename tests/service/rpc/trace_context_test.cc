#include "service/rpc/trace_context.h"

#include <string>

#include "gtest/gtest.h"

namespace keepset::service {
namespace {

constexpr char kTrace[] = "0af7651916cd43dd8448eb211c80319c";
constexpr char kSpan[] = "b7ad6b7169203331";

std::string Header(const std::string& version, const std::string& trace, const std::string& span,
                   const std::string& flags) {
  return version + "-" + trace + "-" + span + "-" + flags;
}

TEST(Traceparent, NamesTraceAndSpan) {
  const auto context = ParseTraceparent(Header("00", kTrace, kSpan, "01"));
  ASSERT_TRUE(context.has_value());
  EXPECT_EQ(*context, (TraceContext{kTrace, kSpan}));
}

TEST(Traceparent, OfALaterVersionIsReadAsFarAsVersion00Goes) {
  EXPECT_TRUE(ParseTraceparent(Header("01", kTrace, kSpan, "09")).has_value());
  EXPECT_TRUE(ParseTraceparent(Header("cc", kTrace, kSpan, "01-what the future holds")));
  EXPECT_FALSE(ParseTraceparent(Header("cc", kTrace, kSpan, "01.what the future holds")));
}

TEST(Traceparent, OfVersion00HasOneLengthOnly) {
  EXPECT_FALSE(ParseTraceparent(Header("00", kTrace, kSpan, "01-")));
  EXPECT_FALSE(ParseTraceparent(Header("00", kTrace, kSpan, "01-more")));
  EXPECT_FALSE(ParseTraceparent(Header("00", kTrace, kSpan, "1")));
}

TEST(Traceparent, OfVersionFfIsInvalid) {
  EXPECT_FALSE(ParseTraceparent(Header("ff", kTrace, kSpan, "01")));
}

TEST(Traceparent, IdsOfZerosAreInvalid) {
  EXPECT_FALSE(ParseTraceparent(Header("00", std::string(32, '0'), kSpan, "01")));
  EXPECT_FALSE(ParseTraceparent(Header("00", kTrace, std::string(16, '0'), "01")));
}

TEST(Traceparent, WantsSmallHexadecimalDigits) {
  EXPECT_FALSE(ParseTraceparent(Header("00", "0AF7651916CD43DD8448EB211C80319C", kSpan, "01")));
  EXPECT_FALSE(ParseTraceparent(Header("00", kTrace, "b7ad6b716920333g", "01")));
  EXPECT_FALSE(ParseTraceparent(Header("0x", kTrace, kSpan, "01")));
  EXPECT_FALSE(ParseTraceparent(Header("00", kTrace, kSpan, "0\n")));
}

TEST(Traceparent, WantsItsDashesInPlace) {
  std::string header = Header("00", kTrace, kSpan, "01");
  for (size_t i : {2, 35, 52}) {
    std::string bent = header;
    bent[i] = '_';
    EXPECT_FALSE(ParseTraceparent(bent)) << bent;
  }
}

TEST(Traceparent, ShortAndEmptyTextIsInvalid) {
  const std::string header = Header("00", kTrace, kSpan, "01");
  for (size_t length = 0; length < header.size(); ++length) {
    EXPECT_FALSE(ParseTraceparent(header.substr(0, length))) << length;
  }
}

}  // namespace
}  // namespace keepset::service
