#include "tests/gpu/targets.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::gpu {
namespace {

using Json = nlohmann::json;
using ::testing::HasSubstr;

constexpr char kPortable[] = "portable to two-pass floor, T 32768, contiguous";
constexpr char kHopper[] = "Hopper to two-pass floor, T 32768, contiguous";

Verdict VerdictOn(const std::string& target, const std::vector<Json>& lines) {
  for (const Verdict& verdict : JudgeTargets(lines)) {
    if (verdict.target == target) return verdict;
  }
  ADD_FAILURE() << "no target " << target;
  return {};
}

Json Window(const char* path, double ratio) {
  return {{"bench", "window_scores"},
          {"path", path},
          {"seq_len", 32768},
          {"head_dim", 128},
          {"rows", 64},
          {"window_lse", false},
          {"paged", false},
          {"one_call", true},
          {"device_ms", 4.0},
          {"ratio_to_two_pass", ratio},
          {"ratio_to_one_pass", ratio},
          {"floor_has_gemm", true}};
}

Json Without(Json line, const char* field) {
  line.erase(field);
  return line;
}

Json With(Json line, const char* field, const Json& value) {
  line[field] = value;
  return line;
}

TEST(Targets, RunWithoutLinesHasMeasuredNothing) {
  const std::vector<Verdict> verdicts = JudgeTargets({});
  EXPECT_GT(verdicts.size(), 60u);
  for (const Verdict& verdict : verdicts) {
    EXPECT_EQ(verdict.verdict, kNotMeasured) << verdict.target;
    EXPECT_FALSE(verdict.measured.has_value()) << verdict.target;
    EXPECT_NE(verdict.note, "") << verdict.target;
  }
}

TEST(Targets, SmallerWindowsAreNoFigureOfIt) {
  const Json small = With(Window("hopper", 9.0), "rows", 16);
  EXPECT_EQ(VerdictOn(kHopper, {small}).verdict, kNotMeasured);
  EXPECT_EQ(VerdictOn(kHopper, {small, Window("hopper", 1.2)}).measured, 1.2);
}

TEST(Targets, NamesAreUnique) {
  std::set<std::string> names;
  for (const Verdict& verdict : JudgeTargets({})) {
    EXPECT_TRUE(names.insert(verdict.target).second) << verdict.target;
  }
}

TEST(Targets, FigureIsHeldAgainstItsLimit) {
  EXPECT_EQ(VerdictOn(kPortable, {Window("portable", 3.0)}).verdict, kReached);
  const Verdict beyond = VerdictOn(kPortable, {Window("portable", 3.01)});
  EXPECT_EQ(beyond.verdict, kNotReached);
  EXPECT_EQ(beyond.goal, "<= 3x");
  EXPECT_DOUBLE_EQ(beyond.measured.value_or(0.0), 3.01);
}

TEST(Targets, GoalThatIsAFloorIsHeldFromBelow) {
  const std::string target = "gather of 32 layers, 512 of 32768, to copy";
  const Json gather = {{"bench", "gather"}, {"layers", 32}, {"seq_len", 32768}, {"budget", 512}};
  EXPECT_EQ(VerdictOn(target, {With(gather, "share_of_copy", 0.76)}).verdict, kReached);
  EXPECT_EQ(VerdictOn(target, {With(gather, "share_of_copy", 0.74)}).verdict, kNotReached);
}

// A line about anything else is no figure of the target.
TEST(Targets, OtherLinesAreNoFigureOfATarget) {
  const Json line = Window("portable", 1.0);
  for (const Json& other :
       {With(line, "seq_len", 4096), With(line, "paged", true), With(line, "window_lse", true),
        With(line, "head_dim", 80), With(line, "one_call", false), With(line, "bench", "select"),
        With(line, "path", "hopper"), With(line, "path", "mixed"), Without(line, "path"),
        Without(line, "ratio_to_two_pass")}) {
    EXPECT_EQ(VerdictOn(kPortable, {other}).verdict, kNotMeasured) << other;
  }
}

// What portable kernels did in place of Hopper's is no figure of Hopper's.
TEST(Targets, HopperIsNotReachedByPortableKernels) {
  EXPECT_EQ(VerdictOn(kHopper, {Window("portable", 1.0)}).verdict, kNotMeasured);
  EXPECT_EQ(VerdictOn(kHopper, {Window("mixed", 1.0)}).verdict, kNotMeasured);
  EXPECT_EQ(VerdictOn(kHopper, {Window("hopper", 1.0)}).verdict, kReached);
}

TEST(Targets, PeerWithoutItsLibraryIsNotYetMeasured) {
  const std::string target = "peer with cuBLAS, ms, T 32768";
  const Json skipped = {
      {"bench", "window_scores"}, {"path", "cublas"}, {"skipped", "no libcublas.so.13"}};
  const Verdict without = VerdictOn(target, {skipped, Window("portable", 1.0)});
  EXPECT_EQ(without.verdict, kNotMeasured);
  EXPECT_EQ(without.note, "no libcublas.so.13");
  EXPECT_DOUBLE_EQ(VerdictOn(target, {Window("cublas", 9.0)}).measured.value_or(0.0), 4.0);
}

TEST(Targets, ValueThatCannotBeAFigureIsNone) {
  for (const Json& value : {Json(nullptr), Json("1.0"), Json(true), Json(0.0), Json(-1.0),
                            Json(std::numeric_limits<double>::quiet_NaN()),
                            Json(std::numeric_limits<double>::infinity()), Json::array({1.0})}) {
    const Json line = With(Window("portable", 1.0), "ratio_to_two_pass", value);
    EXPECT_EQ(VerdictOn(kPortable, {line}).verdict, kNotMeasured) << value;
  }
}

TEST(Targets, WorstOfSeveralLinesCounts) {
  const std::vector<Json> lines = {Window("portable", 2.0), Window("portable", 3.5),
                                   Window("portable", 1.0)};
  EXPECT_DOUBLE_EQ(VerdictOn(kPortable, lines).measured.value_or(0.0), 3.5);
  EXPECT_EQ(VerdictOn(kPortable, lines).verdict, kNotReached);
}

TEST(Targets, OneLineThatAllocatesIsEnough) {
  const std::string target = "device memory that warm window scores allocate";
  const Json quiet = With(Window("portable", 1.0), "allocated_bytes", 0);
  const Json loud = With(Window("portable", 1.0), "allocated_bytes", 2097152);
  EXPECT_EQ(VerdictOn(target, {quiet, quiet}).verdict, kReached);
  EXPECT_EQ(VerdictOn(target, {quiet, loud}).verdict, kNotReached);
}

TEST(Targets, OneLineInWhichTheHostWaitedIsEnough) {
  const std::string target = "window scores queued before the device begins";
  const Json ahead = With(Window("portable", 1.0), "host_ahead", 1.0);
  EXPECT_EQ(VerdictOn(target, {ahead}).verdict, kReached);
  EXPECT_EQ(VerdictOn(target, {ahead, With(ahead, "host_ahead", 0.01)}).verdict, kNotReached);
}

// Its launches are more than a stream holds.
TEST(Targets, HostThatWaitsBehindTheCublasPeerIsNoFigure) {
  const std::string target = "window scores queued before the device begins";
  const Json ahead = With(Window("portable", 1.0), "host_ahead", 1.0);
  const Json peer = With(Window("cublas", 9.0), "host_ahead", 0.0);
  EXPECT_EQ(VerdictOn(target, {ahead, peer}).verdict, kReached);
  EXPECT_EQ(VerdictOn(target, {peer}).verdict, kNotMeasured);
}

TEST(Targets, MillisecondsCountOnTheDeviceTheyAreStatedFor) {
  const std::string target = "portable, T 32768";
  const Json line = Window("portable", 2.0);
  EXPECT_EQ(VerdictOn(target, {line}).verdict, kNotMeasured);
  const Json h100 = {{"bench", "device"}, {"name", "NVIDIA H100 80GB HBM3"}};
  EXPECT_EQ(VerdictOn(target, {h100, line}).verdict, kNotMeasured);
  const Json h200 = {{"bench", "device"}, {"name", "NVIDIA H200"}};
  EXPECT_EQ(VerdictOn(target, {h200, line}).verdict, kReached);
  EXPECT_EQ(VerdictOn(target, {h200, With(line, "device_ms", 4.3)}).verdict, kNotReached);
}

// Such a floor may be too low: a ratio within the goal stays within it, one beyond may not be.
TEST(Targets, FloorWithoutGemmRefutesNothing) {
  const Json line = With(Window("portable", 3.5), "floor_has_gemm", false);
  const Verdict beyond = VerdictOn(kPortable, {line});
  EXPECT_EQ(beyond.verdict, kNotMeasured);
  EXPECT_FALSE(beyond.measured.has_value());
  const Verdict within = VerdictOn(kPortable, {With(line, "ratio_to_two_pass", 2.5)});
  EXPECT_EQ(within.verdict, kReached);
  EXPECT_THAT(within.note, HasSubstr("without the GEMM ceiling"));
}

TEST(Targets, FigureWithoutAGoalIsMeasuredOnly) {
  const Json peer = {{"peer", "grouped"}, {"seq_len", 4096}, {"ms", 2.5}};
  EXPECT_EQ(VerdictOn("peer grouped, from attention to kept rows, ms, T 4096", {peer}).verdict,
            kMeasured);
}

TEST(Targets, ServiceMayAddLessThanNothing) {
  const Json line = {{"bench", "service"}, {"seq_len", 32768}, {"added_us_p50", -3.0}};
  EXPECT_EQ(VerdictOn("service adds to in-process, T 32768", {line}).verdict, kReached);
}

TEST(Targets, ObservingHeadsTakeATenthOfAllHeads) {
  const std::string target = "observation_heads, 16 heads, to snapkv, T 32768";
  const Json line = {{"bench", "observation_heads"},
                     {"against", "snapkv"},
                     {"heads", 16},
                     {"seq_len", 32768},
                     {"share", 0.09}};
  EXPECT_EQ(VerdictOn(target, {line}).verdict, kReached);
  EXPECT_EQ(VerdictOn(target, {With(line, "share", 0.11)}).verdict, kNotReached);
  EXPECT_EQ(VerdictOn(target, {With(line, "seq_len", 4096)}).verdict, kNotMeasured);
}

TEST(Targets, FailedTestsAreNoCorrectness) {
  const std::string target = "correctness on the card: exit code of tests";
  EXPECT_EQ(VerdictOn(target, {{{"check", "tests"}, {"exit", 0}}}).verdict, kReached);
  EXPECT_EQ(VerdictOn(target, {{{"check", "tests"}, {"exit", 1}}}).verdict, kNotReached);
  const Verdict skipped =
      VerdictOn(target, {{{"check", "tests"}, {"skipped", "every test was skipped"}}});
  EXPECT_EQ(skipped.verdict, kNotMeasured);
  EXPECT_EQ(skipped.note, "every test was skipped");
}

TEST(Targets, LineThatSaysWhyItHasNoFigureIsQuoted) {
  const Json peer = {{"peer", "grouped"}, {"seq_len", 131072}, {"error", "out of memory"}};
  EXPECT_EQ(VerdictOn("peer grouped, from attention to kept rows, ms, T 131072", {peer}).note,
            "out of memory");
  const Json hopper = {
      {"bench", "window_scores"}, {"path", "hopper"}, {"skipped", "the device is sm_80"}};
  EXPECT_EQ(VerdictOn(kHopper, {hopper}).note, "the device is sm_80");
}

TEST(Targets, WhatNoRunMeasuresIsNeverReached) {
  const Json line = {{"bench", "cpu"}, {"share", 1.0}, {"", 1.0}};
  const Verdict verdict = VerdictOn("reload of a table under load", {line});
  EXPECT_EQ(verdict.verdict, kNotMeasured);
  EXPECT_THAT(verdict.note, HasSubstr("docs/results/registry.md"));
}

}  // namespace
}  // namespace keepset::gpu
