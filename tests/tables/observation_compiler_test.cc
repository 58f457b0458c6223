#include "tables/observation_compiler.h"

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tables/observation_fit.h"
#include "tables/observation_record.h"
#include "tables/safetensors.h"
#include "tables/table_file.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

constexpr int64_t kSeqLen = 200;
constexpr int64_t kCandidates = 9;  // 2 layers x 4 query heads, last row; 1 key novelty

// Candidate 5 sees the needed positions in task "a", candidate 2 those of task "b"; the rest is
// noise.
struct Sample {
  nlohmann::json document;
  std::vector<int32_t> heads;
  std::vector<int32_t> rows;
  std::vector<float> scores;
  int64_t seq_len;
  std::vector<float> need;

  Sample(const std::string& task, int seed, int64_t tokens = kSeqLen)
      : seq_len(tokens), need(tokens, 0.0f) {
    document = {{"format", "keepset.observations"},
                {"format_version", 1},
                {"model", nlohmann::json::parse(ModelFingerprintJson(SmallModel()))},
                {"prompt_id", absl::StrCat(task, "-", tokens, "-", seed)},
                {"task", task},
                {"seq_len", tokens},
                {"protected", {{0, 4}}}};
    std::mt19937_64 random(seed * 7 + static_cast<int>(task[0]));
    const auto draw = [&] { return static_cast<float>(random() % 1000) / 1000.0f; };
    for (int64_t c = 0; c < kCandidates; ++c) {
      const bool is_key = c == kCandidates - 1;
      heads.push_back(is_key ? 1 : static_cast<int32_t>(c / 4));
      heads.push_back(is_key ? 0 : static_cast<int32_t>(c % 4));
      rows.push_back(is_key ? 5 : 0);
      for (int64_t t = 0; t < tokens; ++t) scores.push_back(0.5f * draw());
    }
    const int64_t sees = task == "a" ? 5 : 2;
    for (int i = 0; i < 6; ++i) {
      const int64_t t = 10 + static_cast<int64_t>(random() % (tokens - 20));
      need[t] = 1.0f + draw();
      scores[sees * tokens + t] = 5.0f * need[t];
    }
    need[0] = 100.0f;  // protected: neither wanted nor counted
  }

  std::string Bytes() const {
    const auto view = [](const auto& values) {
      return absl::Span<const std::byte>(reinterpret_cast<const std::byte*>(values.data()),
                                         values.size() * sizeof(values[0]));
    };
    const auto count = static_cast<int64_t>(rows.size());
    return *SerializeSafetensors({{"keepset", document.dump()}},
                                 {{"heads", TensorDType::kI32, {count, 2}, view(heads)},
                                  {"rows", TensorDType::kI32, {count}, view(rows)},
                                  {"scores", TensorDType::kF32, {count, seq_len}, view(scores)},
                                  {"need", TensorDType::kF32, {seq_len}, view(need)}});
  }
};

class ObservationCompiler : public ::testing::Test {
 protected:
  ObservationCompiler() {
    options_.name = "heads";
    options_.version = "1";
    options_.budgets = {12};
    options_.dilations = {0};
    options_.pool_kernels = {1};
    options_.created = absl::FromUnixSeconds(1);
    for (int seed = 0; seed < 6; ++seed) {
      for (const char* task : {"a", "b"}) Add(Sample(task, seed));
    }
  }

  void Add(const Sample& sample) {
    paths_.push_back(directory_.Path(absl::StrCat(paths_.size(), ".safetensors")));
    WriteText(paths_.back(), sample.Bytes());
  }

  absl::StatusOr<CompiledObservationHeads> Compile() const {
    return CompileObservationHeads(paths_, options_, nullptr);
  }

  void ExpectRefused(const Sample& sample, absl::string_view message) {
    Add(sample);
    const absl::Status status = Compile().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::string(message)));
  }

  TemporaryDirectory directory_;
  std::vector<std::string> paths_;
  ObservationCompileOptions options_;
};

TEST_F(ObservationCompiler, FindsTheHeadOfEachTask) {
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  std::vector<std::pair<int64_t, int64_t>> heads;
  for (const HeadObservation& one : compiled->content.observations) {
    heads.emplace_back(one.layer, one.head);
  }
  EXPECT_THAT(heads, UnorderedElementsAre(std::pair(1, 1), std::pair(0, 2)));
  EXPECT_TRUE(SerializeTable(compiled->content).ok());
}

TEST_F(ObservationCompiler, ReportsControlsAndTheWorstTask) {
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const auto report = nlohmann::json::parse(compiled->report_json);
  EXPECT_GT(report["held_out_recall"], 0.8);
  EXPECT_LT(report["shuffled_recall"], 0.6);
  EXPECT_LE(report["held_out_recall"], report["oracle_recall"].get<double>() + 1e-9);
  EXPECT_LE(report["worst_task_recall"], report["held_out_recall"]);
  EXPECT_EQ(report["held_out_recall_by_task"].size(), 2u);
  EXPECT_EQ(report["records"], 12);
}

TEST_F(ObservationCompiler, ReportsEveryTaskAtEveryLength) {
  for (int seed = 0; seed < 2; ++seed) Add(Sample("a", seed, 500));
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const auto report = nlohmann::json::parse(compiled->report_json);
  const auto& recall = report["held_out_recall_by_task_and_length"];
  EXPECT_EQ(recall["a"].size(), 2u);
  EXPECT_EQ(recall["b"].size(), 1u);
  const double of_a = (recall["a"]["256"].get<double>() + recall["a"]["512"].get<double>()) / 2.0;
  EXPECT_NEAR(report["held_out_recall_by_task"]["a"], of_a, 1e-12);
  const double of_b = recall["b"]["256"];
  EXPECT_NEAR(report["held_out_recall"], (of_a + of_b) / 2.0, 1e-12);
  const double worst =
      std::min({recall["a"]["256"].get<double>(), recall["a"]["512"].get<double>(), of_b});
  EXPECT_EQ(report["worst_task_and_length"]["recall"], worst);
  const auto provenance = nlohmann::json::parse(compiled->content.provenance_json);
  EXPECT_EQ(provenance["prompts_per_task_and_length"]["a"]["512"], 2);
}

TEST_F(ObservationCompiler, ALengthCountsWhateverTheNumberOfItsPrompts) {
  // At 500 tokens the need of task "a" is what candidate 2 sees; with one head, it is outnumbered
  // by prompts at 200 tokens and still decides, because those see it less clearly.
  paths_.clear();
  for (int seed = 0; seed < 12; ++seed) {
    Sample sample("a", seed);
    for (int64_t t = 0; t < kSeqLen; ++t) {
      if (sample.need[t] > 0.0f && t % 2 == 0) sample.scores[5 * kSeqLen + t] = 0.0f;
    }
    Add(sample);
  }
  for (int seed = 0; seed < 2; ++seed) {
    Sample sample("b", seed, 500);
    sample.document["task"] = "a";
    Add(sample);
  }
  options_.num_heads = 1;
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_EQ(compiled->content.observations[0].layer, 0);
  EXPECT_EQ(compiled->content.observations[0].head, 2);
}

TEST_F(ObservationCompiler, OnePromptOfEachTaskAndLengthIsValidatedToo) {
  paths_.clear();
  options_.num_folds = 2;
  for (const int64_t tokens : {200, 400, 800, 1600}) {
    for (const char* task : {"a", "b"}) Add(Sample(task, 1, tokens));
  }
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const nlohmann::json report = nlohmann::json::parse(compiled->report_json);
  EXPECT_GT(report["held_out_recall"], 0.75) << compiled->report_json;
  EXPECT_EQ(report["observations"].size(), 2u);
}

TEST_F(ObservationCompiler, NeitherOrderNorThreadsChangeABit) {
  options_.num_threads = 1;
  const std::string want = *SerializeTable(Compile()->content);
  std::reverse(paths_.begin(), paths_.end());
  options_.num_threads = 4;
  EXPECT_EQ(*SerializeTable(Compile()->content), want);
}

TEST_F(ObservationCompiler, ChoosesTheDilationThatFindsWhatFollows) {
  paths_.clear();
  for (int seed = 0; seed < 6; ++seed) {
    Sample sample("a", seed);
    std::rotate(sample.need.rbegin(), sample.need.rbegin() + 2, sample.need.rend());
    sample.need[2] = 0.0f;
    Add(sample);
  }
  options_.budgets = {30};
  options_.dilations = {0, 2};
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_EQ(compiled->content.settings.dilate, 2);
}

// Candidate 5 sees all that task "a" needs and nothing of other tasks, candidate 2 so of task "b".
// Candidates 0, 1, 3 and 4 see a third of what any task needs each, beside false hits.
Sample WithSpecialists(const std::string& task, int seed) {
  Sample sample(task, seed);
  std::fill(sample.scores.begin(), sample.scores.end(), 0.0f);
  std::vector<int64_t> needed;
  for (int64_t t = 4; t < kSeqLen; ++t) {
    if (sample.need[t] > 0.0f) needed.push_back(t);
  }
  for (int64_t c = 0; c < kCandidates - 1; ++c) {
    float* seen = sample.scores.data() + c * kSeqLen;
    for (int64_t t = 4; t < kSeqLen; ++t) seen[t] = 0.001f * static_cast<float>((t * (c + 3)) % 7);
    const bool is_specialist = c == 5 || c == 2;
    if ((c == 5 && task == "a") || (c == 2 && task == "b")) {
      for (const int64_t t : needed) seen[t] = 1.0f;
    } else if (is_specialist || c > 5) {
      seen[4 + (seed * 11 + c) % (kSeqLen - 4)] = 1.0f;
    } else {
      for (size_t i = 0; i < needed.size(); ++i) {
        if (static_cast<int64_t>(i) % 3 == (c == 3 ? 2 : c % 4)) seen[needed[i]] = 1.0f;
      }
      for (int64_t hit = 0; hit < 6; ++hit) {
        float& place = seen[4 + (seed * 31 + c * 17 + hit * 29) % (kSeqLen - 4)];
        place = std::max(place, 0.4f);
      }
    }
  }
  return sample;
}

TEST_F(ObservationCompiler, TakesWhatServesATaskThatItHasNotSeen) {
  paths_.clear();
  for (int seed = 0; seed < 6; ++seed) {
    for (const char* task : {"a", "b"}) Add(WithSpecialists(task, seed));
  }
  const auto recall_of_unseen = [&](const CompiledObservationHeads& compiled) {
    Add(WithSpecialists("c", 40));
    const auto record = ReadObservationRecord(paths_.back());
    paths_.pop_back();
    Choice choice;
    for (const HeadObservation& one : compiled.content.observations) {
      choice.candidates.push_back(one.layer * 4 + one.head);
      choice.weights.push_back(one.weight);
    }
    FitSettings settings;
    settings.budgets = options_.budgets;
    return Recall(PreparePrompt(*record, 1, ObservationNormalization::kMax), choice, settings);
  };
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_GT(recall_of_unseen(*compiled), 0.9);
  // The two that answer every prompt of the calibration set.
  options_.num_heads = 2;
  const auto fewest = Compile();
  ASSERT_TRUE(fewest.ok()) << fewest.status();
  const auto report = nlohmann::json::parse(fewest->report_json);
  EXPECT_DOUBLE_EQ(report["held_out_recall"], 1.0);
  EXPECT_LT(recall_of_unseen(*fewest), 0.5);
}

TEST_F(ObservationCompiler, SaysWhetherTasksOrPromptsWereHeldOut) {
  const auto told = [&] {
    return nlohmann::json::parse(Compile()->content.provenance_json)["number_and_way_chosen_by"]
        .get<std::string>();
  };
  EXPECT_EQ(told(), "held-out tasks");
  paths_.clear();
  for (int seed = 0; seed < 6; ++seed) Add(Sample("a", seed));
  EXPECT_EQ(told(), "held-out prompts: the records are of one task");
}

TEST_F(ObservationCompiler, WhatTheTasksThemselvesNeedIsNotGivenUpForOtherTasks) {
  // Nothing carries over from "a" to "b" or back, whatever the number of heads.
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  const auto report = nlohmann::json::parse(compiled->report_json);
  EXPECT_LT(report["chosen"]["worst_unseen_task_recall"], 0.5);
  EXPECT_GT(report["worst_task_recall"], 0.7);
}

TEST_F(ObservationCompiler, TakesTheNumberOfHeadsThatIsAskedFor) {
  options_.num_heads = 1;
  const auto compiled = Compile();
  ASSERT_TRUE(compiled.ok()) << compiled.status();
  EXPECT_EQ(compiled->content.observations.size(), 1u);
}

TEST_F(ObservationCompiler, ProgressCountsFoldsAndTasks) {
  std::vector<int64_t> done;
  ASSERT_TRUE(CompileObservationHeads(paths_, options_, [&](int64_t step, int64_t total) {
                done.push_back(step);
                EXPECT_EQ(total, 6);
              }).ok());
  EXPECT_THAT(done, ElementsAre(1, 2, 3, 4, 5, 6));
}

TEST_F(ObservationCompiler, OneRecordIsNotEnough) {
  paths_.resize(1);
  EXPECT_EQ(Compile().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ObservationCompiler, ThePromptOfARecordIsItsOwn) {
  ExpectRefused(Sample("a", 0), "prompt a-200-0 of task a is recorded twice");
}

TEST_F(ObservationCompiler, RecordsOfTwoModelsAreRefused) {
  Sample sample("a", 90);
  sample.document["model"]["architecture"] = "other";
  ExpectRefused(sample, "model differs");
}

TEST_F(ObservationCompiler, RecordsOfTwoCandidateListsAreRefused) {
  Sample sample("a", 90);
  std::swap(sample.heads[1], sample.heads[3]);
  ExpectRefused(sample, "candidates or probe differ");
}

TEST_F(ObservationCompiler, ARecordWithoutNeedIsRefused) {
  Sample sample("a", 90);
  std::fill(sample.need.begin() + 4, sample.need.end(), 0.0f);
  ExpectRefused(sample, "no needed mass");
}

TEST_F(ObservationCompiler, ARecordWhoseNeedIsAllProtectedIsRefusedHoweverItRounds) {
  Sample sample("a", 91);
  std::fill(sample.need.begin(), sample.need.end(), 0.0f);
  // In double, 1e9 + 2e-7 - 1e9 is more than 2e-7.
  sample.need[0] = 1e9f;
  sample.need[1] = 2e-7f;
  ExpectRefused(sample, "no needed mass outside protected positions");
}

TEST_F(ObservationCompiler, LittleNeedBesideMuchThatIsProtectedCounts) {
  Sample sample("a", 92);
  std::fill(sample.need.begin() + 4, sample.need.end(), 0.0f);
  sample.need[0] = 1e20f;
  sample.need[4] = 1.0f;
  Add(sample);
  EXPECT_TRUE(Compile().ok()) << Compile().status();
}

TEST_F(ObservationCompiler, OptionsOutOfRangeAreRefused) {
  const ObservationCompileOptions good = options_;
  const auto refused = [&](auto change) {
    options_ = good;
    change(options_);
    EXPECT_EQ(Compile().status().code(), absl::StatusCode::kInvalidArgument);
  };
  refused([](ObservationCompileOptions& o) { o.budgets.clear(); });
  refused([](ObservationCompileOptions& o) { o.budgets = {0}; });
  refused([](ObservationCompileOptions& o) { o.pool_kernels = {2}; });
  refused([](ObservationCompileOptions& o) { o.dilations = {-1}; });
  refused([](ObservationCompileOptions& o) { o.dilations.clear(); });
  refused([](ObservationCompileOptions& o) { o.max_heads = 0; });
  refused([](ObservationCompileOptions& o) { o.num_heads = 17; });
  refused([](ObservationCompileOptions& o) { o.num_folds = 1; });
}

absl::Status RecordStatus(const Sample& sample) {
  const std::string bytes = sample.Bytes();
  const auto file = SafetensorsFile::Parse(AsBytes(bytes), "record");
  return file.ok() ? ParseObservationRecord(**file).status() : file.status();
}

TEST(ObservationRecord, APublicLibrarysFileIsRead) {
  const auto record = ReadObservationRecord(
      absl::StrCat(KEEPSET_SOURCE_DIR, "/tests/golden/public_library_observations.safetensors"));
  ASSERT_TRUE(record.ok()) << record.status();
  EXPECT_THAT(record->candidates,
              ElementsAre(HeadObservation{1, 2, ObservedRows::kMeanRows, 1.0f},
                          HeadObservation{0, 1, ObservedRows::kKeyNovelty, 1.0f}));
  EXPECT_THAT(record->scores, ElementsAre(0, 0.25f, 0.5f, 0.25f, -1, 1, 0.5f, -0.5f));
  EXPECT_THAT(record->need, ElementsAre(0, 0, 2, 1));
  EXPECT_EQ(record->probe->name, "recall");
}

TEST(ObservationRecord, DamageIsRefused) {
  const auto refused = [](auto change, const std::string& message) {
    Sample sample("a", 1);
    change(sample);
    const absl::Status status = RecordStatus(sample);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  };
  EXPECT_TRUE(RecordStatus(Sample("a", 1)).ok());
  refused([](Sample& s) { s.document["format"] = "keepset.table"; }, "want keepset.observations");
  refused([](Sample& s) { s.document.erase("task"); }, "task");
  refused([](Sample& s) { s.document["seq_len"] = 100; }, "tensor scores");
  refused([](Sample& s) { s.document["protected"] = {{4, 2}}; }, "protected");
  refused([](Sample& s) { s.document["protected"] = {{0, 4}, {2, 9}}; }, "protected");
  refused([](Sample& s) { s.heads[0] = 2; }, "want a layer in 0..1");
  refused([](Sample& s) { s.heads[1] = 4; }, "want a query head in 0..3");
  refused([](Sample& s) { s.rows[0] = 7; }, "want 0..5");
  refused([](Sample& s) { s.heads[3] = 0; }, "each candidate once");
  refused([](Sample& s) { s.need[9] = -1.0f; }, "tensor need");
  refused([](Sample& s) { s.scores[9] = -1.0f; }, "attention of at least 0");
}

TEST(ObservationMixture, LengthsAreClassesOfTwiceTheTokens) {
  EXPECT_EQ(LengthClass(1), 1);
  EXPECT_EQ(LengthClass(724), 512);
  EXPECT_EQ(LengthClass(725), 1024);
  EXPECT_EQ(LengthClass(1030), 1024);
  EXPECT_EQ(LengthClass(1448), 1024);
  EXPECT_EQ(LengthClass(1449), 2048);
}

TEST(ObservationMixture, TasksThenLengthsThenPromptsShareAlike) {
  std::vector<FitPrompt> prompts(5);
  const std::vector<std::pair<std::string, int64_t>> made = {
      {"a", 1000}, {"a", 1030}, {"a", 2000}, {"b", 4000}, {"c", 1}};
  for (size_t p = 0; p < made.size(); ++p) {
    prompts[p].task = made[p].first;
    prompts[p].seq_len = made[p].second;
  }
  EXPECT_THAT(MixtureShares(prompts, {0, 1, 2, 3}), ElementsAre(0.125, 0.125, 0.25, 0.5));
}

TEST(ObservationRecall, CountsNeedOnKeptPositionsOutsideProtectedOnes) {
  FitPrompt prompt;
  prompt.seq_len = 6;
  prompt.need = {0, 1, 2, 0, 3, 4};
  prompt.total_need = 10;
  prompt.is_protected = {true, false, false, false, false, false};
  prompt.num_protected = 1;
  const std::vector<float> scores = {9, 1, 5, 0, 0, 2};
  FitSettings settings;
  settings.budgets = {3};  // the protected one, 2 and 5
  EXPECT_DOUBLE_EQ(Recall(prompt, scores, settings), 0.6);
  settings.budgets = {2};
  EXPECT_DOUBLE_EQ(Recall(prompt, scores, settings), 0.2);
  settings.dilate = 1;  // 1 stands behind the best of all, which is protected; then 2
  settings.budgets = {3};
  EXPECT_DOUBLE_EQ(Recall(prompt, scores, settings), 0.3);
}

// Three positions and a protected one, whose score counts for nothing: columns (1, 1, 0) and
// (0, 1, 1).
FitPrompt TwoColumns(std::vector<double> need) {
  FitPrompt prompt;
  prompt.task = "a";
  prompt.seq_len = 4;
  prompt.columns = {1.0f, 1.0f, 0.0f, 100.0f, 0.0f, 1.0f, 1.0f, 50.0f};
  prompt.need = std::move(need);
  prompt.need.push_back(0.0);
  prompt.is_protected = {false, false, false, true};
  prompt.num_protected = 1;
  return prompt;
}

// Of the normal equations of either test: the columns' squares are 2.
constexpr double kRidge = 2e-3;

TEST(RefitWeights, FindsTheWeightsOfASum) {
  const double weight = 1.5 / (3.0 + kRidge);  // 1/2 of each, need being scaled to a maximum of 1
  EXPECT_THAT(RefitWeights({TwoColumns({3.0, 6.0, 3.0})}, {0}, {0, 1}),
              ElementsAre(DoubleNear(weight, 1e-9), DoubleNear(weight, 1e-9)));
}

// Without the bound 2/3 and -1/3: the other weight is refitted, not cut off.
TEST(RefitWeights, AWeightBelowZeroIsLeftOut) {
  EXPECT_THAT(RefitWeights({TwoColumns({1.0, 0.0, 0.0})}, {0}, {1, 0}),
              ElementsAre(0.0, DoubleNear(1.0 / (2.0 + kRidge), 1e-9)));
}

}  // namespace
}  // namespace keepset::tables
