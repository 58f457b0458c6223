#include "clients/cli/flag_parser.h"

#include <optional>
#include <string>
#include <vector>

#include "clients/cli/exit_status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::cli {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FlagParserTest : public ::testing::Test {
 protected:
  FlagParserTest() {
    parser_.Text("--out", "FILE", "where to", &out_)
        .List("--param", "K=V", "parameters", &params_)
        .Int("--budget", "N", "positions", &budget_)
        .Real("--ppl", "X", "perplexity", &ppl_)
        .Switch("--json", "as JSON", &json_)
        .Alias("-o", "--out");
  }

  absl::StatusOr<std::vector<std::string>> Parse(const std::vector<std::string>& arguments) {
    return parser_.Parse(arguments, 0, 2);
  }
  std::string Error(const std::vector<std::string>& arguments) {
    const auto parsed = Parse(arguments);
    EXPECT_EQ(ExitCodeOf(parsed.status()), ExitCode::kUsage);
    return std::string(parsed.status().message());
  }

  FlagParser parser_{"test", "test FILE", "Tests."};
  std::optional<std::string> out_;
  std::vector<std::string> params_;
  std::optional<int64_t> budget_;
  std::optional<double> ppl_;
  bool json_ = false;
};

TEST_F(FlagParserTest, TakesValuesBehindSpaceAndEquals) {
  ASSERT_TRUE(Parse({"--out", "a", "--budget=12"}).ok());
  EXPECT_EQ(out_, "a");
  EXPECT_EQ(budget_, 12);
}

TEST_F(FlagParserTest, TakesNegativeNumbers) {
  ASSERT_TRUE(Parse({"--budget", "-3"}).ok());
  EXPECT_EQ(budget_, -3);
}

TEST_F(FlagParserTest, KeepsEqualsSignsOfTheValue) {
  ASSERT_TRUE(Parse({"--param=a=b=c"}).ok());
  EXPECT_THAT(params_, ElementsAre("a=b=c"));
}

TEST_F(FlagParserTest, CollectsRepeatedLists) {
  ASSERT_TRUE(Parse({"--param", "a=1", "--param", "b=2"}).ok());
  EXPECT_THAT(params_, ElementsAre("a=1", "b=2"));
}

TEST_F(FlagParserTest, KeepsPositionalsInOrder) {
  const auto positionals = Parse({"x", "--json", "y"});
  ASSERT_TRUE(positionals.ok());
  EXPECT_THAT(*positionals, ElementsAre("x", "y"));
  EXPECT_TRUE(json_);
}

TEST_F(FlagParserTest, TakesEverythingBehindDashesAsPositional) {
  const auto positionals = Parse({"--", "--json"});
  ASSERT_TRUE(positionals.ok());
  EXPECT_THAT(*positionals, ElementsAre("--json"));
  EXPECT_FALSE(json_);
}

TEST_F(FlagParserTest, KnowsAliases) {
  ASSERT_TRUE(Parse({"-o", "a"}).ok());
  EXPECT_EQ(out_, "a");
}

TEST_F(FlagParserTest, RefusesUnknownFlagsWithTheNearest) {
  EXPECT_THAT(Error({"--budgte", "3"}), AllOf(HasSubstr("--budgte"), HasSubstr("--budget?")));
}

TEST_F(FlagParserTest, RefusesAFarUnknownFlagWithoutASuggestion) {
  EXPECT_THAT(Error({"--completely-else"}), ::testing::Not(HasSubstr("did you mean")));
}

TEST_F(FlagParserTest, RefusesAMissingValue) {
  EXPECT_THAT(Error({"--budget"}), HasSubstr("--budget N"));
}

TEST_F(FlagParserTest, RefusesAFlagGivenTwice) {
  EXPECT_THAT(Error({"--budget", "1", "--budget", "2"}), HasSubstr("twice"));
}

TEST_F(FlagParserTest, RefusesAnAliasBesideItsFlag) {
  EXPECT_THAT(Error({"-o", "a", "--out", "b"}), HasSubstr("twice"));
}

TEST_F(FlagParserTest, RefusesWhatIsNoInteger) {
  EXPECT_THAT(Error({"--budget", "1.5"}), AllOf(HasSubstr("1.5"), HasSubstr("integer")));
}

TEST_F(FlagParserTest, RefusesWhatIsNoNumber) {
  EXPECT_THAT(Error({"--ppl", "nan"}), AllOf(HasSubstr("nan"), HasSubstr("number")));
}

TEST_F(FlagParserTest, RefusesAValueForASwitch) {
  EXPECT_THAT(Error({"--json=yes"}), HasSubstr("takes no value"));
}

TEST_F(FlagParserTest, RefusesTooManyPositionals) {
  EXPECT_THAT(Error({"a", "b", "c"}), HasSubstr("test FILE"));
}

TEST_F(FlagParserTest, HelpDescribesEveryFlag) {
  const std::string help = parser_.Help();
  for (const char* flag : {"--out FILE", "--param K=V", "--budget N", "--ppl X", "--json"}) {
    EXPECT_THAT(help, HasSubstr(flag));
  }
}

}  // namespace
}  // namespace keepset::cli
