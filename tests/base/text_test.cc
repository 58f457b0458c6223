#include "base/text.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace keepset {
namespace {

const std::string kLong(127, 'a');

TEST(CutText, LeavesShortTextAsItIs) {
  EXPECT_EQ(CutText("", 0), "");
  EXPECT_EQ(CutText("é", 2), "é");
}

TEST(CutText, CutsNoCharacter) {
  EXPECT_EQ(CutText(kLong + "é", 128), kLong);
  EXPECT_EQ(CutText(kLong + "éé", 129), kLong + "é");
  EXPECT_EQ(CutText("a😀", 4), "a");
  EXPECT_EQ(CutText("😀", 3), "");
  EXPECT_EQ(CutText("é", 0), "");
}

TEST(CutText, KeepsTheLimitForBytesThatAreNoText) {
  EXPECT_EQ(CutText(std::string(100, '\x80'), 50).size(), 50u);
}

TEST(ToText, KeepsEveryCharacterOfUtf8) {
  for (const char* text : {"", "plain", "quote\" \\ \n", "é", "€", "\uffff", "😀", "\U0010ffff"}) {
    EXPECT_EQ(ToText(text), text);
  }
  EXPECT_EQ(ToText(absl::string_view("a\0b", 3)), std::string("a\0b", 3));
}

TEST(ToText, EscapesWhatIsNoCharacter) {
  struct Case {
    std::string bytes;
    std::string text;
  };
  const std::vector<Case> cases = {
      {"x\xff.safetensors", "x\\xff.safetensors"},
      {"a\xc3", "a\\xc3"},                  // cut in its middle
      {"\xa9z", "\\xa9z"},                  // its end alone
      {"\xc0\xaf", "\\xc0\\xaf"},           // '/' overlong
      {"\xe0\x80\xaf", "\\xe0\\x80\\xaf"},  // the same in three bytes
      {"\xed\xa0\x80", "\\xed\\xa0\\x80"},  // a surrogate
      {"\xf0\x80\x80\xaf", "\\xf0\\x80\\x80\\xaf"},
      {"\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80"},  // beyond U+10FFFF
      {"\xe2\x82"
       "é",
       "\\xe2\\x82é"},
  };
  for (const Case& c : cases) EXPECT_EQ(ToText(c.bytes), c.text);
}

TEST(ToText, StaysWithinTheLimit) {
  EXPECT_EQ(ToText(kLong + "é", 128), kLong);
  EXPECT_EQ(ToText(std::string(10, '\xff'), 9), "\\xff\\xff\\");
}

TEST(ToPrintable, LettersOfAllScriptsStay) {
  for (const char* text : {"", "plain ~", "Grüße", "日本語", "\U0001F600", "\u00a0\u2027\u2030"}) {
    EXPECT_EQ(ToPrintable(text), text);
  }
}

TEST(ToPrintable, WhatMovesTheCursorOrEndsALineIsEscaped) {
  EXPECT_EQ(ToPrintable("a\x1b[2J\nb\x7f"), "a\\x1b[2J\\x0ab\\x7f");
  EXPECT_EQ(ToPrintable(absl::string_view("\0", 1)), "\\x00");
  EXPECT_EQ(ToPrintable("\u009b"), "\\xc2\\x9b");  // begins an escape sequence
  EXPECT_EQ(ToPrintable("\u2028"), "\\xe2\\x80\\xa8");
}

TEST(ToPrintable, WhatTurnsTheDirectionIsEscaped) {
  EXPECT_EQ(ToPrintable("\u202e"), "\\xe2\\x80\\xae");
  EXPECT_EQ(ToPrintable("\u2066"), "\\xe2\\x81\\xa6");
  EXPECT_EQ(ToPrintable("\u200f"), "\\xe2\\x80\\x8f");
  EXPECT_EQ(ToPrintable("\u061c"), "\\xd8\\x9c");
}

TEST(ToPrintable, BytesThatAreNoTextAreEscaped) {
  EXPECT_EQ(ToPrintable("\xff"
                        "é\xc3"),
            "\\xffé\\xc3");
}

}  // namespace
}  // namespace keepset
