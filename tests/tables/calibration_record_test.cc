#include "tables/calibration_record.h"

#include <cmath>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/record_scanner.h"
#include "tests/tables/record_samples.h"

namespace keepset::tables {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using Json = nlohmann::json;

// Views into the record live as long as this.
struct Parsed {
  std::string line;
  std::string scratch;
  absl::StatusOr<CalibrationRecord> record;
};

std::unique_ptr<Parsed> ParseLine(std::string line, const RecordRules& rules = {}) {
  auto parsed = std::make_unique<Parsed>();
  parsed->line = std::move(line);
  parsed->record = ParseCalibrationRecord(parsed->line, rules, parsed->scratch);
  return parsed;
}

std::string MessageOf(const std::string& line, const RecordRules& rules = {}) {
  const auto parsed = ParseLine(line, rules);
  EXPECT_TRUE(absl::IsInvalidArgument(parsed->record.status())) << parsed->record.status();
  return std::string(parsed->record.status().message());
}

// The sample without `field`, or with another value of it.
std::string Without(Json record, const char* field) {
  record.erase(field);
  return record.dump();
}
std::string With(Json record, const char* field, const Json& value) {
  record[field] = value;
  return record.dump();
}

TEST(CalibrationRecord, HeadRewardIsTheLossSaved) {
  const auto parsed = ParseLine(HeadRecord().dump());
  ASSERT_TRUE(parsed->record.ok()) << parsed->record.status();
  EXPECT_EQ(parsed->record->kind, RecordKind::kHead);
  EXPECT_EQ(parsed->record->layer, 1);
  EXPECT_EQ(parsed->record->head, 2);
  EXPECT_EQ(parsed->record->budget, 64);
  EXPECT_EQ(parsed->record->action, 13);
  EXPECT_EQ(parsed->record->prompt_id, "p1");
  EXPECT_EQ(parsed->record->paired_policy, "g-1");
  EXPECT_EQ(parsed->record->reward, -0.5);
}

TEST(CalibrationRecord, GateRewardAlsoPaysForCandidatesBeyondTheBudget) {
  const auto parsed = ParseLine(GateRecord().dump());
  ASSERT_TRUE(parsed->record.ok()) << parsed->record.status();
  EXPECT_EQ(parsed->record->reward, -0.5 - (576.0 - 64.0) / 2048.0);
  EXPECT_EQ(parsed->record->entropy, 8.42);
  EXPECT_EQ(parsed->record->ppl, 12.7);
}

TEST(CalibrationRecord, GateRewardIsNotRaisedByFewCandidates) {
  const auto parsed = ParseLine(With(GateRecord(), "candidate_count", 3));
  ASSERT_TRUE(parsed->record.ok());
  EXPECT_EQ(parsed->record->reward, -0.5);
}

TEST(CalibrationRecord, LossesMayStandInAnObject) {
  Json record = HeadRecord();
  record.erase("full_loss");
  record.erase("compressed_loss");
  record["loss"] = {{"full", 1.0}, {"compressed", 1.25}};
  const auto parsed = ParseLine(record.dump());
  ASSERT_TRUE(parsed->record.ok()) << parsed->record.status();
  EXPECT_EQ(parsed->record->reward, -0.25);
}

TEST(CalibrationRecord, LossesGivenTwiceAreRefused) {
  EXPECT_THAT(MessageOf(With(HeadRecord(), "loss", {{"full", 1.0}})), HasSubstr("full_loss"));
}

TEST(CalibrationRecord, StatedRewardWins) {
  const auto parsed = ParseLine(With(GateRecord(), "reward", 0.125));
  ASSERT_TRUE(parsed->record.ok());
  EXPECT_EQ(parsed->record->reward, 0.125);
}

TEST(CalibrationRecord, StatedRewardNeedsNoLosses) {
  Json record = HeadRecord();
  record.erase("full_loss");
  record.erase("compressed_loss");
  record["reward"] = -3;
  const auto parsed = ParseLine(record.dump());
  ASSERT_TRUE(parsed->record.ok()) << parsed->record.status();
  EXPECT_EQ(parsed->record->reward, -3);
}

TEST(CalibrationRecord, UnknownKeysOfAnyFormAreIgnored) {
  Json record = HeadRecord();
  record["notes"] = {{"nested", {1, 2.5, "x", nullptr, true, {{"kind", "other"}}}}};
  record["run"] = "a";
  EXPECT_TRUE(ParseLine(record.dump())->record.ok());
}

TEST(CalibrationRecord, NullCountsAsAbsent) {
  EXPECT_TRUE(ParseLine(With(HeadRecord(), "reward", nullptr))->record.ok());
  EXPECT_THAT(MessageOf(With(HeadRecord(), "head", nullptr)), HasSubstr("head=(missing)"));
}

TEST(CalibrationRecord, AQuarterStepOffTheGridIsTakenAndMoreIsNot) {
  const auto parsed = ParseLine(With(HeadRecord(), "action", 1.131));
  ASSERT_TRUE(parsed->record.ok());
  EXPECT_EQ(parsed->record->action, 13);
  EXPECT_THAT(MessageOf(With(HeadRecord(), "action", 1.132)), StartsWith("action=1.132"));
}

TEST(CalibrationRecord, EveryGridPointHasItsIndexAsDoubleAndAsFloat) {
  for (const ActionGrid& grid : {kHeadActions, kGateActions}) {
    for (int i = 0; i < grid.size; ++i) {
      EXPECT_EQ(grid.IndexOf(grid.first + grid.step * i), i);
      EXPECT_EQ(grid.IndexOf(grid.Value(i)), i);
    }
    EXPECT_EQ(grid.IndexOf(grid.first - grid.step), std::nullopt);
    EXPECT_EQ(grid.IndexOf(grid.first + grid.step * grid.size), std::nullopt);
    EXPECT_EQ(grid.IndexOf(std::numeric_limits<double>::quiet_NaN()), std::nullopt);
  }
}

TEST(CalibrationRecord, GateActionsHaveTheirOwnGrid) {
  EXPECT_THAT(MessageOf(With(GateRecord(), "action", 1.125)), StartsWith("action=1.125"));
}

TEST(CalibrationRecord, PairedPolicyIsMandatoryUnlessIndependentRecordsAreAllowed) {
  const std::string line = Without(HeadRecord(), "paired_policy");
  EXPECT_THAT(MessageOf(line), StartsWith("paired_policy=(missing)"));
  RecordRules rules;
  rules.paired_policy = PairedPolicyRule::kOptional;
  EXPECT_TRUE(ParseLine(line, rules)->record.ok());
}

TEST(CalibrationRecord, NanLossIsNamed) {
  const std::string line = absl::StrReplaceAll(HeadRecord().dump(), {{"2.5", "NaN"}});
  EXPECT_THAT(MessageOf(line), StartsWith("compressed_loss=NaN"));
}

TEST(CalibrationRecord, InfiniteLossIsNamed) {
  const std::string line = absl::StrReplaceAll(HeadRecord().dump(), {{"2.5", "-Infinity"}});
  EXPECT_THAT(MessageOf(line), StartsWith("compressed_loss=-Infinity"));
}

TEST(CalibrationRecord, RewardBeyondAnyLossIsRefused) {
  EXPECT_THAT(MessageOf(With(HeadRecord(), "compressed_loss", 1e9)),
              StartsWith("compressed_loss=1000000000.0"));
}

TEST(CalibrationRecord, ZeroLengthPromptIsRefused) {
  EXPECT_THAT(MessageOf(With(HeadRecord(), "sequence_length", 0)), StartsWith("sequence_length=0"));
}

TEST(CalibrationRecord, MoreCandidatesThanTokensAreRefused) {
  EXPECT_THAT(MessageOf(With(GateRecord(), "candidate_count", 2049)),
              StartsWith("candidate_count=2049"));
}

TEST(CalibrationRecord, LayerAndHeadMustBeOfTheModel) {
  RecordRules rules;
  rules.num_layers = 2;
  rules.num_qo_heads = 3;
  rules.num_kv_heads = 1;
  EXPECT_TRUE(ParseLine(HeadRecord().dump(), rules)->record.ok());
  EXPECT_THAT(MessageOf(With(HeadRecord(), "layer", 2), rules), StartsWith("layer=2, want"));
  EXPECT_THAT(MessageOf(With(HeadRecord(), "head", 3), rules), StartsWith("head=3, want"));
}

TEST(CalibrationRecord, KvHeadNamesAHeadGroup) {
  Json record = HeadRecord();
  record.erase("head");
  record["kv_head"] = 1;
  RecordRules rules;
  rules.num_layers = 2;
  rules.num_qo_heads = 4;
  rules.num_kv_heads = 2;
  const auto parsed = ParseLine(record.dump(), rules);
  ASSERT_TRUE(parsed->record.ok()) << parsed->record.status();
  EXPECT_EQ(parsed->record->head_unit, HeadUnit::kKvHead);
  EXPECT_EQ(parsed->record->head, 1);
  EXPECT_THAT(MessageOf(With(record, "kv_head", 2), rules), StartsWith("kv_head=2"));
  EXPECT_THAT(MessageOf(With(HeadRecord(), "kv_head", 0)), HasSubstr("not both"));
}

TEST(CalibrationRecord, IntegersMustBeWrittenAsSuch) {
  EXPECT_THAT(MessageOf(With(HeadRecord(), "budget", 64.0)), StartsWith("budget=64.0"));
  EXPECT_THAT(MessageOf(With(HeadRecord(), "budget", "64")), StartsWith("budget=\"64\""));
}

TEST(CalibrationRecord, PerplexityMustBePositive) {
  EXPECT_THAT(MessageOf(With(GateRecord(), "ppl", 0)), StartsWith("ppl=0"));
  EXPECT_THAT(MessageOf(With(GateRecord(), "ppl", 1e39)), StartsWith("ppl=1e+39"));
}

TEST(CalibrationRecord, EntropyMustBeInRange) {
  EXPECT_THAT(MessageOf(With(GateRecord(), "entropy", -0.5)), StartsWith("entropy=-0.5"));
}

TEST(CalibrationRecord, EveryFieldThatMustBeThereIsNamedWhenItIsNot) {
  for (const char* field : {"kind", "prompt_id", "layer", "head", "budget", "action", "full_loss",
                            "compressed_loss", "sequence_length"}) {
    EXPECT_THAT(MessageOf(Without(HeadRecord(), field)), StartsWith(field));
  }
  for (const char* field : {"entropy", "ppl", "candidate_count"}) {
    EXPECT_THAT(MessageOf(Without(GateRecord(), field)), StartsWith(field));
  }
}

TEST(CalibrationRecord, EveryPrefixOfALineIsRefused) {
  const std::string line = GateRecord().dump();
  for (std::size_t size = 0; size < line.size(); ++size) {
    EXPECT_FALSE(ParseLine(line.substr(0, size))->record.ok()) << line.substr(0, size);
  }
}

TEST(CalibrationRecord, DamagedJsonIsRefused) {
  for (const char* line : {"", "[]", "1", "{,}", "{\"kind\" \"head\"}", "{\"kind\":}",
                           "{\"budget\":01}", "{\"budget\":1.}", "{\"budget\":1e}", "{\"x\":[1,]}",
                           "{\"x\":tru}", "{\"x\":NaN}", "{} {}", "{\"x\":1,}"}) {
    EXPECT_FALSE(ParseLine(line)->record.ok()) << line;
  }
}

TEST(CalibrationRecord, EscapedAndPlainTextAreTheSame) {
  const std::string plain = HeadRecord().dump();
  const std::string escaped = absl::StrReplaceAll(plain, {{"\"p1\"", "\"\\u0070\\u0031\""}});
  const auto a = ParseLine(plain);
  const auto b = ParseLine(escaped);
  ASSERT_TRUE(b->record.ok()) << b->record.status();
  EXPECT_EQ(b->record->prompt_id, "p1");
  EXPECT_EQ(RecordIdentity(*a->record), RecordIdentity(*b->record));
}

TEST(CalibrationRecord, FullParserReadsTheSameFields) {
  for (const Json& sample : {HeadRecord(), GateRecord()}) {
    const std::string line = sample.dump();
    RawRecord fast;
    RawRecord full;
    std::string scratch;
    ASSERT_EQ(ScanRecordFast(line, fast), absl::OkStatus());
    ASSERT_TRUE(ScanRecordFully(line, full, scratch).ok());
    for (int i = 0; i < static_cast<int>(RecordField::kNumFields); ++i) {
      const RawValue* a = fast.Find(static_cast<RecordField>(i));
      const RawValue* b = full.Find(static_cast<RecordField>(i));
      ASSERT_EQ(a == nullptr, b == nullptr) << i;
      if (a == nullptr) continue;
      EXPECT_EQ(a->type, b->type) << i;
      EXPECT_EQ(a->real, b->real) << i;
      EXPECT_EQ(a->text, b->text) << i;
    }
  }
}

TEST(CalibrationRecord, NonAsciiTextIsAccepted) {
  EXPECT_EQ(ParseLine(With(HeadRecord(), "prompt_id", "gr\u00fcn"))->record->prompt_id,
            "gr\u00fcn");
}

TEST(RecordIdentity, ChangesWithEveryPartOfTheKey) {
  const uint64_t base = RecordIdentity(*ParseLine(HeadRecord().dump())->record);
  for (const auto& [field, value] : {std::pair<const char*, Json>{"prompt_id", "p2"},
                                     {"seed", 1},
                                     {"layer", 0},
                                     {"head", 1},
                                     {"budget", 65},
                                     {"action", 1.15},
                                     {"paired_policy", "g-2"}}) {
    EXPECT_NE(RecordIdentity(*ParseLine(With(HeadRecord(), field, value))->record), base) << field;
  }
}

TEST(RecordIdentity, DoesNotChangeWithWhatWasMeasured) {
  EXPECT_EQ(RecordIdentity(*ParseLine(HeadRecord().dump())->record),
            RecordIdentity(*ParseLine(With(HeadRecord(), "compressed_loss", 3.0))->record));
}

}  // namespace
}  // namespace keepset::tables
