#include "service/rpc/shadow_choice.h"

#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tables/table_file.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

std::shared_ptr<const tables::DecisionTable> Table(const std::string& name,
                                                   const std::string& version) {
  const std::string bytes = fakes::TableBytes(name, version);
  auto table = tables::ParseTable(
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()), name);
  EXPECT_TRUE(table.ok()) << table.status();
  return *std::move(table);
}

// Line a: version 1 active, 2 canary, 3 loaded. Line b: version 1 active.
class ChooseShadowTest : public ::testing::Test {
 protected:
  ChooseShadowTest() {
    snapshot_.tables = {a1_, b1_};
    snapshot_.loaded = {a1_, a2_, a3_, b1_};
    snapshot_.roles["a"].canary = a2_;
    snapshot_.roles["a"].canary_basis_points = 10000;
    snapshot_.roles["a"].canary_salt = "salt";
    spec_.table = a1_;
    query_.kind = "compilerkv";
    query_.model = a1_->model();
    query_.name = "a";
    query_.request_id = "request";
    wire_.set_request_id("request");
  }
  std::optional<absl::Status> Choose() {
    return ChooseShadow(wire_, options_, snapshot_, query_, spec_);
  }

  const std::shared_ptr<const tables::DecisionTable> a1_ = Table("a", "1");
  const std::shared_ptr<const tables::DecisionTable> a2_ = Table("a", "2");
  const std::shared_ptr<const tables::DecisionTable> a3_ = Table("a", "3");
  const std::shared_ptr<const tables::DecisionTable> b1_ = Table("b", "1");
  tables::TableSnapshot snapshot_;
  tables::TableQuery query_;
  engine::OperationSpec spec_;
  v1::OperationSpec wire_;
  ShadowOptions options_;
};

TEST_F(ChooseShadowTest, NobodyAsksByDefault) {
  EXPECT_FALSE(Choose().has_value());
  EXPECT_EQ(spec_.shadow_table, nullptr);
}

TEST_F(ChooseShadowTest, TheServersWishIsOfTheDecidingLine) {
  options_ = {.table = {}, .basis_points = 10000};
  options_.table.set_alias("canary");
  EXPECT_EQ(Choose(), absl::OkStatus());
  EXPECT_EQ(spec_.shadow_table, a2_);
}

TEST_F(ChooseShadowTest, TheServersWishYieldsWhereThereIsNoSuchTable) {
  options_ = {.table = {}, .basis_points = 10000};
  options_.table.set_alias("canary");
  spec_.table = b1_;
  EXPECT_FALSE(Choose().has_value());
}

TEST_F(ChooseShadowTest, TheServersWishYieldsWhereThatTableDecides) {
  options_ = {.table = {}, .basis_points = 10000};
  options_.table.set_alias("canary");
  spec_.table = a2_;
  EXPECT_FALSE(Choose().has_value());
}

TEST_F(ChooseShadowTest, TheRequestsWishWins) {
  options_ = {.table = {}, .basis_points = 10000};
  options_.table.set_alias("canary");
  wire_.mutable_shadow_table()->set_version("3");
  EXPECT_EQ(Choose(), absl::OkStatus());
  EXPECT_EQ(spec_.shadow_table, a3_);
}

TEST_F(ChooseShadowTest, TheRequestMayNameAnotherLine) {
  wire_.mutable_shadow_table()->set_name("b");
  EXPECT_EQ(Choose(), absl::OkStatus());
  EXPECT_EQ(spec_.shadow_table, b1_);
  wire_.mutable_shadow_table()->Clear();
  wire_.mutable_shadow_table()->set_digest(b1_->identity().digest);
  EXPECT_EQ(Choose(), absl::OkStatus());
  EXPECT_EQ(spec_.shadow_table, b1_);
}

TEST_F(ChooseShadowTest, ALineAloneMeansItsActiveVersionNotItsCanary) {
  spec_.table = b1_;
  wire_.mutable_shadow_table()->set_name("a");
  EXPECT_EQ(Choose(), absl::OkStatus());
  EXPECT_EQ(spec_.shadow_table, a1_);
}

TEST_F(ChooseShadowTest, WhatTheRequestNamesAndIsNotThereIsSaid) {
  wire_.mutable_shadow_table()->set_version("9");
  const auto chosen = Choose();
  ASSERT_TRUE(chosen.has_value());
  EXPECT_EQ(chosen->code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(spec_.shadow_table, nullptr);
}

TEST(IsShadowed, TakesTheStatedShareByRequestIdAlone) {
  const ShadowOptions options = {.table = {}, .basis_points = 1000};
  int taken = 0;
  constexpr int kRequests = 20000;
  for (int i = 0; i < kRequests; ++i) {
    const std::string id = absl::StrCat("request-", i);
    const bool first = IsShadowed(options, id);
    EXPECT_EQ(IsShadowed(options, id), first);
    taken += first ? 1 : 0;
  }
  // A tenth; five standard deviations are 212.
  EXPECT_NEAR(taken, kRequests / 10, 212);
}

TEST(IsShadowed, LeavesOutRequestsWithoutAnId) {
  EXPECT_FALSE(IsShadowed({.table = {}, .basis_points = 10000}, ""));
}

}  // namespace
}  // namespace keepset::service
