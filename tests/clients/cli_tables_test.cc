#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/cli_runner.h"

namespace keepset::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::json;

class TablesCommand : public CliTest {
 protected:
  CliRun Uniform(const std::string& name, const std::string& gate) {
    return RunBinary({"tables", "uniform", "--like", Golden("cli_capture.safetensors"), "--name",
                      "neutral", "--version", "1", "--gate", gate, "--out", Path(name)});
  }
};

TEST_F(TablesCommand, InspectSaysWhatTheTableIs) {
  const CliRun run = RunBinary({"tables", "inspect", Golden("cli_table.safetensors"), "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Json table = Json::parse(run.out);
  EXPECT_EQ(table["name"], "golden-cli");
  EXPECT_EQ(table["kind"], "compilerkv");
  EXPECT_EQ(table["model"]["num_layers"], 3);
}

TEST_F(TablesCommand, InspectForPeopleHasALinePerField) {
  const CliRun run = RunBinary({"tables", "inspect", Golden("cli_table.safetensors")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, AllOf(HasSubstr("golden-cli"), HasSubstr("provenance.source")));
}

TEST_F(TablesCommand, ValidateAcceptsEveryGoodFile) {
  const CliRun run = RunBinary({"tables", "validate", Golden("cli_table.safetensors"),
                                Golden("public_library_table.safetensors")});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, AllOf(HasSubstr("golden-cli"), HasSubstr("public-library")));
}

TEST_F(TablesCommand, ValidateRefusesATruncatedTableAndReportsTheOthers) {
  std::filesystem::copy_file(Golden("cli_table.safetensors"), Path("torn"));
  std::filesystem::resize_file(Path("torn"), 100);
  const CliRun run =
      RunBinary({"tables", "validate", Path("torn"), Golden("cli_table.safetensors")});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr(Path("torn")));
  EXPECT_THAT(run.out, HasSubstr("golden-cli"));
}

TEST_F(TablesCommand, ValidateOfAMissingFileIsUsage) {
  EXPECT_EQ(RunBinary({"tables", "validate", Path("nowhere")}).exit_code, 2);
}

TEST_F(TablesCommand, DiffOfATableWithItselfIsEmpty) {
  const std::string table = Golden("cli_table.safetensors");
  const CliRun run = RunBinary({"tables", "diff", table, table});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_THAT(run.out, IsEmpty());
}

TEST_F(TablesCommand, DiffNamesWhatDiffers) {
  ASSERT_EQ(Uniform("a", "0.8").exit_code, 0);
  ASSERT_EQ(Uniform("b", "0.9").exit_code, 0);
  const CliRun run = RunBinary({"tables", "diff", Path("a"), Path("b"), "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(Json::parse(run.out)["differences"].dump(), HasSubstr("gate_thresholds"));
}

TEST_F(TablesCommand, UniformIsNamedAsSuchAndServesItsCapture) {
  ASSERT_EQ(Uniform("table", "0.8").exit_code, 0);
  const CliRun inspect = RunBinary({"tables", "inspect", Path("table"), "--json"});
  EXPECT_EQ(Json::parse(inspect.out)["provenance"]["source"], "uniform");
  EXPECT_EQ(
      Compress({"--policy", "compilerkv", "--budget", "9", "--table", Path("table")}).exit_code, 0);
}

// The golden capture, its counts beside its model only.
void WriteCaptureWithoutModelCounts(const std::string& from, const std::string& to) {
  std::ifstream in(from, std::ios::binary);
  uint64_t header_bytes = 0;
  in.read(reinterpret_cast<char*>(&header_bytes), sizeof(header_bytes));
  std::string header(header_bytes, ' ');
  in.read(header.data(), static_cast<std::streamsize>(header_bytes));
  Json json = Json::parse(header);
  Json document = Json::parse(json["__metadata__"]["keepset"].get<std::string>());
  for (const char* count : {"num_layers", "num_qo_heads", "num_kv_heads", "head_dim"}) {
    document["model"].erase(count);
  }
  json["__metadata__"]["keepset"] = document.dump();
  header = json.dump();
  header_bytes = header.size();
  std::ofstream out(to, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  out << header << in.rdbuf();
}

TEST_F(TablesCommand, LikeTakesTheCountsThatTheCaptureStatesBesideItsModel) {
  WriteCaptureWithoutModelCounts(Golden("cli_capture.safetensors"), Path("capture"));
  const CliRun run = RunBinary({"tables", "uniform", "--like", Path("capture"), "--name", "n",
                                "--version", "1", "--out", Path("t")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const CliRun inspect = RunBinary({"tables", "inspect", Path("t"), "--json"});
  EXPECT_EQ(Json::parse(inspect.out)["model"]["num_layers"], 3);
}

TEST_F(TablesCommand, UniformRefusesAGateOffItsRange) {
  const CliRun run = Uniform("table", "1.5");
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("1.5"));
  EXPECT_THAT(Files(), IsEmpty());
}

TEST_F(TablesCommand, UniformNeedsOneModelSource) {
  const CliRun run =
      RunBinary({"tables", "uniform", "--name", "n", "--version", "1", "--out", Path("table")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, AllOf(HasSubstr("--model-json"), HasSubstr("--like")));
}

TEST_F(TablesCommand, OutOfTheModelsFileIsUsageAndLeavesItAsItIs) {
  std::ofstream(Path("m.json")) << "{}";
  const CliRun run = RunBinary({"tables", "uniform", "--model-json", Path("m.json"), "--name", "n",
                                "--version", "1", "--out", Path("m.json")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("is the same file as the --model-json " + Path("m.json")));
  EXPECT_EQ(std::filesystem::file_size(Path("m.json")), 2u);
}

TEST_F(TablesCommand, OutOfTheTableTheModelIsOfIsUsage) {
  std::filesystem::copy_file(Golden("cli_table.safetensors"), Path("t"));
  const CliRun run = RunBinary({"tables", "uniform", "--like", Path("t"), "--name", "n",
                                "--version", "1", "--out", Path("t")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("is the same file as the --like"));
}

TEST_F(TablesCommand, OutOfAnImportedFileIsUsage) {
  std::ofstream(Path("manifest.json")) << R"({"gate_table": "gates"})";
  for (const char* name : {"manifest.json", "W_head.npy", "gates"}) {
    std::ofstream(Path(name), std::ios::app).flush();
    const CliRun run =
        RunBinary({"tables", "import", Path(""), "--like", Golden("cli_capture.safetensors"),
                   "--name", "n", "--version", "1", "--out", Path(name)});
    EXPECT_EQ(run.exit_code, 2) << name;
    EXPECT_THAT(run.err, HasSubstr("is the same file as the")) << name;
  }
}

TEST_F(TablesCommand, ImportOfADirectoryWithoutManifestIsUsage) {
  std::ofstream(Path("model.json")) << R"({"architecture":"llama","num_layers":1,)"
                                       R"("num_qo_heads":2,"num_kv_heads":1,"head_dim":4})";
  const CliRun run =
      RunBinary({"tables", "import", Path("nowhere"), "--model-json", Path("model.json"), "--name",
                 "n", "--version", "1", "--out", Path("table")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("manifest.json"));
}

}  // namespace
}  // namespace keepset::cli
