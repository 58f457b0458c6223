// Activations and rollbacks under load, from a directory and from etcd: nothing fails, no answer is
// of two tables. tests/bench/registry_swap_bench.cc is the long form, with latencies.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "service/registry/etcd/etcd_layout.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/etcd_server.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/swap_load.h"

namespace keepset::integration {
namespace {

class RegistrySwap : public testing::Test {
 protected:
  void ExpectWholeAnswers(const std::string& config) {
    TestServer server(absl::StrCat(config, " table_writes: true"));
    SwapLoadOptions options;
    options.address = server.address();
    options.num_streams = 32;
    options.num_swaps = 200;
    options.operations_per_swap = 8;
    options.quiet_operations = 64;
    const absl::StatusOr<SwapLoadReport> report = RunSwapLoad(options, prompt_, tables_);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->failed, 0) << report->first_complaint;
    EXPECT_EQ(report->mixed, 0) << report->first_complaint;
    EXPECT_EQ(report->activations, 150);
    EXPECT_EQ(report->rollbacks, 50);
    EXPECT_GT(report->swapping.operations, 200);
  }

  const fakes::SyntheticPrompt prompt_{{.num_layers = 2}};
  const std::vector<AnsweringTable> tables_ = SwapLoadTables(prompt_);
};

TEST_F(RegistrySwap, FailsAndMixesNothingFromADirectory) {
  const fakes::ScratchDirectory directory;
  for (const AnsweringTable& table : tables_) {
    fakes::WriteInPlace(directory / absl::StrCat(table.version, ".safetensors"), table.file);
  }
  ExpectWholeAnswers(absl::StrCat("tables_directory: \"", directory.path(), "\""));
}

TEST_F(RegistrySwap, FailsAndMixesNothingFromEtcd) {
  EtcdServer etcd;
  ASSERT_TRUE(etcd.Start());
  const service::etcd::Layout layout("/keepset");
  for (const AnsweringTable& table : tables_) {
    etcd.Put(layout.TableKey(table.name, table.version), table.file);
  }
  service::LineAssignment line;
  line.mode = service::LineMode::kChosen;
  line.active = service::TableTarget{tables_[0].version, tables_[0].digest};
  etcd.Put(layout.LineKey("live"), service::etcd::SerializeLine(line));
  ExpectWholeAnswers(absl::StrCat("etcd { endpoints: \"", etcd.endpoint(), "\" }"));
}

}  // namespace
}  // namespace keepset::integration
