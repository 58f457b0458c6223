// `keepset compress` against answers that were computed apart from the engine
// (tests/golden/make_cli_capture.py).
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "clients/cli/command_list.h"
#include "clients/cli/console.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/safetensors.h"
#include "tests/clients/cli_runner.h"

namespace keepset::cli {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr int64_t kSeqLen = 40;
constexpr int64_t kRowBytes = 8 * 2;  // head_dim in F16

using Json = nlohmann::json;
using Sets = std::vector<std::vector<std::vector<int32_t>>>;  // [layer][set]

Json Expected() {
  std::ifstream stream(std::string(KEEPSET_SOURCE_DIR) + "/tests/golden/cli_capture_expected.json");
  return Json::parse(stream);
}

std::unique_ptr<tables::SafetensorsFile> OpenFile(const std::string& path) {
  auto file = tables::SafetensorsFile::Open(path, tables::ReadMode::kCopy);
  EXPECT_TRUE(file.ok()) << file.status();
  return *std::move(file);
}

std::string SetName(const Sets& sets, size_t layer, const std::string& tensor, size_t set) {
  const std::string name = "layers." + std::to_string(layer) + "." + tensor;
  return sets[layer].size() == 1 ? name : name + "." + std::to_string(set);
}

void ExpectKeepIndices(const tables::SafetensorsFile& file, const Sets& want) {
  for (size_t layer = 0; layer < want.size(); ++layer) {
    for (size_t set = 0; set < want[layer].size(); ++set) {
      const std::string name = SetName(want, layer, "keep_indices", set);
      const tables::TensorInfo* tensor = file.Find(name);
      ASSERT_NE(tensor, nullptr) << name;
      EXPECT_EQ(tensor->dtype, tables::TensorDType::kI32) << name;
      std::vector<int32_t> got(tensor->num_elements);
      std::memcpy(got.data(), tensor->bytes.data(), tensor->bytes.size());
      EXPECT_EQ(got, want[layer][set]) << name;
    }
  }
}

// One policy's flags and the expected answer.
struct PolicyCase {
  std::string policy;
  std::vector<std::string> flags;
};

class CompressGolden : public CliTest, public ::testing::WithParamInterface<PolicyCase> {
 protected:
  std::vector<std::string> Flags() const {
    std::vector<std::string> flags = {"--policy", GetParam().policy, "--budget", "12"};
    flags.insert(flags.end(), GetParam().flags.begin(), GetParam().flags.end());
    return flags;
  }
};

TEST_P(CompressGolden, KeepsThePositionsOfTheOracle) {
  const CliRun run = Compress(Flags());
  ASSERT_EQ(run.exit_code, 0) << run.err;
  ExpectKeepIndices(*OpenFile(Path("result")),
                    Expected()["policies"][GetParam().policy].get<Sets>());
}

TEST_P(CompressGolden, GathersTheKeptRowsBitForBit) {
  std::vector<std::string> flags = Flags();
  flags.push_back("--gather");
  const CliRun run = Compress(flags);
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const auto result = OpenFile(Path("result"));
  const auto capture = OpenFile(Golden("cli_capture.safetensors"));
  const Sets sets = Expected()["policies"][GetParam().policy].get<Sets>();
  for (size_t layer = 0; layer < sets.size(); ++layer) {
    for (const char* tensor : {"k", "v"}) {
      const tables::TensorInfo* source =
          capture->Find("layers." + std::to_string(layer) + "." + tensor);
      ASSERT_NE(source, nullptr);
      const auto row = [&](size_t head, int32_t position) {
        return source->bytes.subspan((head * kSeqLen + position) * kRowBytes, kRowBytes);
      };
      for (size_t set = 0; set < sets[layer].size(); ++set) {
        const tables::TensorInfo* kept = result->Find(SetName(sets, layer, tensor, set));
        ASSERT_NE(kept, nullptr);
        std::vector<std::byte> want;
        const bool shared = sets[layer].size() == 1;
        for (size_t head = shared ? 0 : set; head < (shared ? 2 : set + 1); ++head) {
          for (int32_t position : sets[layer][set]) {
            const auto bytes = row(head, position);
            want.insert(want.end(), bytes.begin(), bytes.end());
          }
        }
        EXPECT_EQ(std::vector<std::byte>(kept->bytes.begin(), kept->bytes.end()), want)
            << kept->name;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, CompressGolden,
                         ::testing::Values(PolicyCase{"snapkv", {}}, PolicyCase{"tova", {}},
                                           PolicyCase{"knorm", {}}, PolicyCase{"streaming_llm", {}},
                                           PolicyCase{"compilerkv",
                                                      {"--ppl", "12.7", "--table",
                                                       std::string(KEEPSET_SOURCE_DIR) +
                                                           "/tests/golden/cli_table.safetensors"}}),
                         [](const auto& info) {
                           std::string name;
                           for (char c : info.param.policy) {
                             if (c != '_') name += c;
                           }
                           return name;
                         });

class CompressCommand : public CliTest {};

TEST_F(CompressCommand, ReadsCapturesWithoutVersionAndWithRowPositions) {
  const CliRun run = RunBinary({"compress", Golden("public_library_capture.safetensors"),
                                "--policy", "tova", "--budget", "2", "--out", Path("result")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_NE(OpenFile(Path("result"))->Find("layers.1.keep_indices"), nullptr);
}

TEST_F(CompressCommand, StaysQuietInAPipe) {
  const CliRun run = Compress({"--policy", "tova", "--budget", "12"});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_THAT(run.out, IsEmpty());
  EXPECT_THAT(run.err, IsEmpty());
}

TEST_F(CompressCommand, TellsATerminalWhatWasKept) {
  std::ostringstream out;
  std::ostringstream err;
  Console console{out, err, StreamKind::kTerminal};
  ASSERT_EQ(RunKeepset({"compress", Golden("cli_capture.safetensors"), "--policy", "tova",
                        "--budget", "12", "--out", Path("result")},
                       console),
            0)
      << err.str();
  EXPECT_THAT(out.str(), AllOf(HasSubstr("compressed by tova, scope layer_equal, reason none"),
                               HasSubstr("12 of 40 positions, 7.7 kB -> 2.3 kB"),
                               HasSubstr("wrote    " + Path("result"))));
}

TEST_F(CompressCommand, PrintsTheFilesDocumentAsJson) {
  const CliRun run = Compress({"--policy", "tova", "--budget", "12", "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  Json printed = Json::parse(run.out);
  EXPECT_EQ(printed["transport"], "in_process");
  EXPECT_TRUE(printed["stage_seconds"].is_object());
  printed.erase("transport");
  printed.erase("stage_seconds");
  const auto file = OpenFile(Path("result"));
  ASSERT_NE(file->metadata("keepset"), nullptr);
  EXPECT_EQ(printed, Json::parse(*file->metadata("keepset")));
}

TEST_F(CompressCommand, SameFileForAnyThreadCount) {
  std::string first;
  for (const char* threads : {"1", "2", "8"}) {
    ASSERT_EQ(Compress({"--policy", "snapkv", "--budget", "12", "--threads", threads}).exit_code,
              0);
    const std::string digest = OpenFile(Path("result"))->Digest();
    if (first.empty()) first = digest;
    EXPECT_EQ(digest, first) << threads;
  }
}

TEST_F(CompressCommand, KeptFullIsDone) {
  const CliRun run = Compress({"--policy", "snapkv", "--budget", "40", "--json"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  const Json printed = Json::parse(run.out);
  EXPECT_EQ(printed["outcome"], "kept_full");
  EXPECT_EQ(printed["reason"], "below_budget");
}

TEST_F(CompressCommand, ShadowIsReportedAsSuch) {
  const CliRun run = Compress({"--policy", "tova", "--budget", "12", "--shadow", "--json"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(Json::parse(run.out)["outcome"], "shadow");
}

TEST_F(CompressCommand, ProtectsANamedSpan) {
  const CliRun run = Compress({"--policy", "random", "--budget", "4", "--protect-span", "system"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const auto file = OpenFile(Path("result"));
  const auto kept = tables::ReadInts(*file, *file->Find("layers.0.keep_indices"));
  ASSERT_TRUE(kept.ok());
  EXPECT_THAT(*kept, ::testing::IsSupersetOf({3, 4, 5}));
}

TEST_F(CompressCommand, KeptFractionIsConvertedToTokens) {
  const CliRun run = Compress({"--policy", "tova", "--kept-fraction", "0.25", "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(Json::parse(run.out)["layers"][0]["kept"], 10);
}

TEST_F(CompressCommand, MissingCaptureIsUsage) {
  const CliRun run = RunBinary(
      {"compress", Path("nowhere"), "--policy", "tova", "--budget", "2", "--out", Path("result")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
  EXPECT_THAT(run.err, AllOf(HasSubstr(Path("nowhere")), HasSubstr("No such file")));
}

TEST_F(CompressCommand, UnknownPolicyIsUsageAndSuggestsOne) {
  const CliRun run = Compress({"--policy", "snapvk", "--budget", "2"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
  EXPECT_THAT(run.err, AllOf(HasSubstr("snapvk"), HasSubstr("did you mean snapkv?")));
}

TEST_F(CompressCommand, MissingTableSaysHowToGiveOne) {
  const CliRun run = Compress({"--policy", "compilerkv", "--budget", "2", "--ppl", "3"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
  EXPECT_THAT(run.err, AllOf(HasSubstr("compilerkv"), HasSubstr("--table FILE")));
}

TEST_F(CompressCommand, MissingTableFileIsUsage) {
  const CliRun run = Compress({"--policy", "compilerkv", "--ppl", "3", "--table", Path("nowhere")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, AllOf(HasSubstr("table"), HasSubstr(Path("nowhere"))));
}

TEST_F(CompressCommand, MissingPerplexitySaysHowToGiveIt) {
  const CliRun run = Compress(
      {"--policy", "compilerkv", "--budget", "12", "--table", Golden("cli_table.safetensors")});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
  EXPECT_THAT(run.err, AllOf(HasSubstr("ppl"), HasSubstr("--ppl X")));
}

TEST_F(CompressCommand, WrongServerAddressIsUnreachable) {
  const CliRun run =
      Compress({"--policy", "tova", "--budget", "2", "--server", "unix:" + Path("no.sock")});
  EXPECT_EQ(run.exit_code, 4);
  EXPECT_TRUE(IsOneLine(run.err)) << run.err;
  EXPECT_THAT(run.err, HasSubstr(Path("no.sock")));
}

TEST_F(CompressCommand, UnknownParameterIsUsage) {
  const CliRun run = Compress({"--policy", "snapkv", "--budget", "9", "--param", "kernal_size=3"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, AllOf(HasSubstr("kernal_size"), HasSubstr("kernel_size")));
}

TEST_F(CompressCommand, ParameterOutOfRangeIsRefused) {
  const CliRun run = Compress({"--policy", "snapkv", "--budget", "9", "--param", "kernel_size=-1"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("kernel_size=-1"));
}

TEST_F(CompressCommand, UnknownScopeIsUsage) {
  const CliRun run = Compress({"--policy", "snapkv", "--budget", "9", "--scope", "head"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, AllOf(HasSubstr("head"), HasSubstr("kv_head")));
}

TEST_F(CompressCommand, BudgetZeroIsRefused) {
  const CliRun run = Compress({"--policy", "snapkv", "--budget", "0"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("0"));
}

TEST_F(CompressCommand, NegativeBudgetsSayWhatWouldBeRight) {
  for (const std::string flag : {"--budget", "--budget-bytes"}) {
    const CliRun run = Compress({"--policy", "snapkv", flag, "-1"});
    EXPECT_EQ(run.exit_code, 3);
    EXPECT_THAT(run.err, HasSubstr(flag + "=-1, want 1 or more"));
  }
}

TEST_F(CompressCommand, NegativeProtectionIsRefused) {
  const CliRun run = Compress({"--policy", "snapkv", "--budget", "9", "--protect-sink", "-1"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("--protect-sink=-1"));
}

TEST_F(CompressCommand, TableOfAnotherModelIsRefused) {
  const CliRun run = RunBinary({"compress", Golden("public_library_capture.safetensors"),
                                "--policy", "compilerkv", "--budget", "2", "--table",
                                Golden("cli_table.safetensors"), "--out", Path("result")});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, AllOf(HasSubstr("num_layers"), HasSubstr("cli_table.safetensors")));
}

TEST_F(CompressCommand, DamagedTableIsNamedWithoutTheCapture) {
  const std::string path = Path("damaged");
  std::filesystem::copy_file(Golden("cli_table.safetensors"), path);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  const CliRun run =
      Compress({"--policy", "compilerkv", "--budget", "12", "--ppl", "3", "--table", path});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, AllOf(HasSubstr(path), Not(HasSubstr("cli_capture"))));
}

TEST_F(CompressCommand, DamagedCaptureIsRefused) {
  const std::string path = Path("damaged");
  std::filesystem::copy_file(Golden("cli_capture.safetensors"), path);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  const CliRun run =
      RunBinary({"compress", path, "--policy", "tova", "--budget", "2", "--out", Path("result")});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr(path));
}

TEST_F(CompressCommand, RefusedCallLeavesNoFile) {
  EXPECT_EQ(Compress({"--policy", "snapkv", "--budget", "0"}).exit_code, 3);
  EXPECT_THAT(Files(), IsEmpty());
}

TEST_F(CompressCommand, MissingOutDirectoryIsUsage) {
  const CliRun run = RunBinary({"compress", Golden("cli_capture.safetensors"), "--policy", "tova",
                                "--budget", "2", "--out", Path("no/result")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr(Path("no")));
}

TEST_F(CompressCommand, OutOfADirectoryIsUsage) {
  const CliRun run = RunBinary({"compress", Golden("cli_capture.safetensors"), "--policy", "tova",
                                "--budget", "2", "--out", Path("")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("is a directory, want a file name"));
}

TEST_F(CompressCommand, OutOfTheCaptureIsUsageAndLeavesItAsItIs) {
  const std::string capture = Path("capture");
  std::filesystem::copy_file(Golden("cli_capture.safetensors"), capture);
  std::filesystem::create_symlink(capture, Path("link"));
  std::filesystem::create_hard_link(capture, Path("other"));
  const auto size = std::filesystem::file_size(capture);
  for (const char* out : {"capture", "link", "other"}) {
    const CliRun run =
        RunBinary({"compress", capture, "--policy", "tova", "--budget", "2", "--out", Path(out)});
    EXPECT_EQ(run.exit_code, 2) << out;
    EXPECT_THAT(run.err,
                HasSubstr("--out " + Path(out) + ": is the same file as the capture " + capture));
  }
  EXPECT_EQ(std::filesystem::file_size(capture), size);
  EXPECT_TRUE(std::filesystem::is_symlink(Path("link")));
}

TEST_F(CompressCommand, OutOfTheTableIsUsage) {
  std::filesystem::copy_file(Golden("cli_table.safetensors"), Path("result"));
  const CliRun run = Compress(
      {"--policy", "compilerkv", "--budget", "2", "--ppl", "7", "--table", Path("result")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("is the same file as the table"));
}

TEST_F(CompressCommand, ADeviceAsOutIsUsage) {
  const CliRun run = RunBinary({"compress", Golden("cli_capture.safetensors"), "--policy", "tova",
                                "--budget", "2", "--out", "/dev/null"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("/dev/null: is no regular file, want a file name"));
}

TEST_F(CompressCommand, TooManyThreadsNamesTheRange) {
  const CliRun run = Compress({"--policy", "tova", "--budget", "2", "--threads", "99999999999"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("--threads=99999999999, want 0..2147483647"));
}

TEST_F(CompressCommand, FullDiskFailsAndLeavesNoFile) {
  // A limit on file size stands for the full disk: write() fails the same way.
  rlimit old_limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  rlimit small = old_limit;
  small.rlim_cur = 512;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const CliRun run = Compress({"--policy", "tova", "--budget", "12", "--gather"});
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  EXPECT_EQ(run.exit_code, 5) << run.err;
  EXPECT_THAT(Files(), IsEmpty());
}

TEST_F(CompressCommand, UnwritableDirectoryFailsAndLeavesNoFile) {
  // /proc takes no files, not even from root.
  const CliRun run = RunBinary({"compress", Golden("cli_capture.safetensors"), "--policy", "tova",
                                "--budget", "2", "--out", "/proc/result"});
  EXPECT_EQ(run.exit_code, 5) << run.err;
  EXPECT_TRUE(IsOneLine(run.err));
  EXPECT_FALSE(std::filesystem::exists("/proc/result"));
}

TEST_F(CompressCommand, ErrorsAreJsonWhenAsked) {
  const CliRun run = Compress({"--policy", "nothing", "--budget", "2", "--json"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.out, IsEmpty());
  const Json error = Json::parse(run.err);
  EXPECT_EQ(error["error"]["exit_code"], 2);
  EXPECT_EQ(error["error"]["code"], "INVALID_ARGUMENT");
  EXPECT_THAT(error["error"]["message"].get<std::string>(), HasSubstr("nothing"));
}

TEST_F(CompressCommand, ExistingResultIsReplacedOnlyByAGoodOne) {
  ASSERT_EQ(Compress({"--policy", "tova", "--budget", "12"}).exit_code, 0);
  const std::string digest = OpenFile(Path("result"))->Digest();
  EXPECT_EQ(Compress({"--policy", "tova", "--budget", "0"}).exit_code, 3);
  EXPECT_EQ(OpenFile(Path("result"))->Digest(), digest);
  EXPECT_THAT(Files(), ElementsAre("result"));
}

}  // namespace
}  // namespace keepset::cli
