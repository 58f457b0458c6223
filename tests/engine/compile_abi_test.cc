// Tables compiled through keepset.h.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "engine/keepset.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::engine {
namespace {

using ::testing::HasSubstr;

constexpr const char* kModel =
    R"({"architecture":"a","num_layers":1,"num_qo_heads":2,"num_kv_heads":1,"head_dim":4})";

class CompileAbi : public ::testing::Test {
 protected:
  CompileAbi() {
    std::string pattern = ::testing::TempDir() + "keepset_compile_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    records_ = directory_ + "/records";
    out_ = directory_ + "/table";
    std::ofstream(records_)
        << R"({"kind":"head","prompt_id":"p","layer":0,"head":1,"budget":9,"action":1.25,)"
           R"("reward":0.5,"sequence_length":64,"paired_policy":"g"})"
           "\n"
           R"({"kind":"gate","prompt_id":"p","layer":0,"budget":9,"action":0.85,"reward":0.5,)"
           R"("sequence_length":64,"entropy":3,"ppl":7,"candidate_count":9,"paired_policy":"h"})"
           "\n";
    path_ = records_.c_str();
    options_.struct_size = sizeof(options_);
    options_.record_paths = &path_;
    options_.num_record_paths = 1;
    options_.model_json = kModel;
    options_.name = "n";
    options_.version = "1";
    options_.out_path = out_.c_str();
    options_.conservative_weight = NAN;
    options_.num_threads = 1;
  }
  ~CompileAbi() override { std::filesystem::remove_all(directory_); }

  std::string directory_;
  std::string records_;
  std::string out_;
  const char* path_ = nullptr;
  keepset_compile_options options_ = {};
};

TEST_F(CompileAbi, WritesATableAndReports) {
  int64_t bytes_seen = 0;
  options_.progress = [](void* user, int64_t bytes_done, int64_t) {
    *static_cast<int64_t*>(user) = bytes_done;
  };
  options_.progress_user = &bytes_seen;
  keepset_report* report = nullptr;
  ASSERT_EQ(keepset_table_compile(&options_, &report), KEEPSET_OK) << keepset_last_error();
  EXPECT_THAT(keepset_report_json(report), HasSubstr("\"conservative_weight\":0.75"));
  keepset_report_destroy(report);
  EXPECT_EQ(bytes_seen, std::filesystem::file_size(records_));
  keepset_table* table = nullptr;
  ASSERT_EQ(keepset_table_load(out_.c_str(), &table), KEEPSET_OK) << keepset_last_error();
  EXPECT_STREQ(keepset_table_name(table), "n");
  keepset_table_destroy(table);
}

TEST_F(CompileAbi, ReportMayBeLeftOut) {
  EXPECT_EQ(keepset_table_compile(&options_, nullptr), KEEPSET_OK) << keepset_last_error();
}

TEST_F(CompileAbi, SummarizesRecords) {
  keepset_report* report = nullptr;
  ASSERT_EQ(keepset_records_summarize(&options_, &report), KEEPSET_OK) << keepset_last_error();
  EXPECT_THAT(keepset_report_json(report), HasSubstr("\"accepted\":2"));
  keepset_report_destroy(report);
}

TEST_F(CompileAbi, AFailureNamesTheFieldAndLeavesNoFile) {
  options_.solver = "magic";
  EXPECT_EQ(keepset_table_compile(&options_, nullptr), KEEPSET_INVALID_ARGUMENT);
  EXPECT_THAT(keepset_last_error(), HasSubstr("solver=magic"));
  EXPECT_FALSE(std::filesystem::exists(out_));
}

TEST_F(CompileAbi, AMissingRecordFileIsNotFound) {
  const std::string missing = directory_ + "/nowhere";
  path_ = missing.c_str();
  EXPECT_EQ(keepset_table_compile(&options_, nullptr), KEEPSET_NOT_FOUND);
  EXPECT_THAT(keepset_last_error(), HasSubstr("nowhere"));
}

TEST_F(CompileAbi, UninitialisedOptionsAreRefused) {
  const keepset_compile_options empty = {};
  EXPECT_EQ(keepset_table_compile(&empty, nullptr), KEEPSET_INVALID_ARGUMENT);
  EXPECT_EQ(keepset_table_compile(nullptr, nullptr), KEEPSET_INVALID_ARGUMENT);
  options_.num_record_paths = 0;
  EXPECT_EQ(keepset_table_compile(&options_, nullptr), KEEPSET_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace keepset::engine
