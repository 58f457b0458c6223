#include "service/registry/table_registry.h"

#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "service/registry/registry_state.h"
#include "tests/service/registry/registry_fixture.h"

namespace keepset::service {
namespace {

using testing::HasSubstr;

TEST_F(TableRegistryTest, BeginsEmptyAtItsFirstRevision) {
  EXPECT_EQ(registry_->View()->revision, 1);
  EXPECT_EQ(store_.Snapshot()->revision, 1);
  EXPECT_TRUE(registry_->View()->lines.empty());
}

TEST_F(TableRegistryTest, PublishesAWholeSetAsOneRevision) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1"), MakeTable("b", "1")}));
  EXPECT_EQ(store_.Snapshot()->revision, 2);
  EXPECT_EQ(store_.Snapshot()->tables.size(), 2);
}

TEST_F(TableRegistryTest, PublishesNothingForTheSameSet) {
  const TablePtr table = MakeTable("a", "1");
  registry_->Sync("directory", SetOf({table}));
  const uint64_t revision = registry_->View()->revision;
  EXPECT_EQ(registry_->Sync("directory", SetOf({table})).revision, revision);
  EXPECT_EQ(store_.Snapshot()->revision, revision);
}

TEST_F(TableRegistryTest, ActivatesTheNewestOfAWatchedSource) {
  registry_->Sync("directory", SetOf({MakeTable("a", "10"), MakeTable("a", "9")}));
  EXPECT_EQ(Active(), "10");
  EXPECT_EQ(StateOf("10"), VersionState::kActive);
  EXPECT_EQ(StateOf("9"), VersionState::kReady);
}

TEST_F(TableRegistryTest, LeavesWhatIsDeliveredOnRequestReady) {
  registry_->Sync("etcd", SetOf({MakeTable("a", "1")}, ActivationRule::kOnRequest));
  EXPECT_EQ(Active(), "");
  EXPECT_EQ(store_.Snapshot()->loaded.size(), 1);
}

TEST_F(TableRegistryTest, AnUploadIsReadyUntilItIsActivated) {
  ASSERT_TRUE(Upload("1").ok());
  EXPECT_EQ(Active(), "");
  EXPECT_EQ(StateOf("1"), VersionState::kReady);
  ASSERT_TRUE(Activate("1").ok());
  EXPECT_EQ(Active(), "1");
}

TEST_F(TableRegistryTest, AnUploadDoesNotTakeOverAWatchedLine) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  ASSERT_TRUE(Upload("2").ok());
  EXPECT_EQ(Active(), "1");
}

TEST_F(TableRegistryTest, KeepsAnOperatorsChoiceWhenANewerVersionAppears) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  ASSERT_TRUE(Activate("1").ok());
  registry_->Sync("directory", SetOf({MakeTable("a", "1"), MakeTable("a", "2")}));
  EXPECT_EQ(Active(), "1");
  EXPECT_EQ(StateOf("2"), VersionState::kReady);
}

TEST_F(TableRegistryTest, FollowsTheNewestAgainWhenAsked) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1"), MakeTable("a", "2")}));
  ASSERT_TRUE(Activate("1").ok());
  ASSERT_TRUE(registry_->FollowNewest("a", {}).ok());
  EXPECT_EQ(Active(), "2");
}

TEST_F(TableRegistryTest, FollowsNothingWithoutAWatchedSource) {
  ASSERT_TRUE(Upload("1").ok());
  EXPECT_EQ(registry_->FollowNewest("a", {}).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(TableRegistryTest, RetiresAWithdrawnVersion) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1"), MakeTable("a", "2")}));
  registry_->Sync("directory", SetOf({MakeTable("a", "2")}));
  EXPECT_EQ(StateOf("1"), VersionState::kRetired);
  EXPECT_EQ(store_.Snapshot()->loaded.size(), 1);
}

TEST_F(TableRegistryTest, KeepsAChosenVersionItsSourceWithdraws) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  ASSERT_TRUE(Activate("1").ok());
  registry_->Sync("directory", SetOf({MakeTable("a", "2")}));
  EXPECT_EQ(Active(), "1");
  ASSERT_TRUE(Activate("2").ok());
  EXPECT_EQ(StateOf("1"), VersionState::kRetired);
}

TEST_F(TableRegistryTest, TwoSourcesMayHoldTheSameContent) {
  const TablePtr table = MakeTable("a", "1");
  registry_->Sync("directory", SetOf({table}));
  ASSERT_TRUE(Upload("1").ok());
  registry_->Sync("directory", SetOf({}));
  EXPECT_EQ(StateOf("1"), VersionState::kReady);
}

TEST_F(TableRegistryTest, RefusesOtherContentUnderALoadedVersion) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  const absl::Status upload = Upload("1", 1.25f);
  EXPECT_EQ(upload.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(upload.message()), HasSubstr("a@1"));
}

TEST_F(TableRegistryTest, TellsOnceOfATableAnotherSourceHoldsDifferently) {
  ASSERT_TRUE(Upload("1").ok());
  const TablePtr other = MakeTable("a", "1", 1.25f);
  registry_->Sync("directory", SetOf({other}));
  registry_->Sync("directory", SetOf({other}));
  ASSERT_EQ(observer_.refused().size(), 1);
  EXPECT_EQ(observer_.refused()[0].why.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(LineA()->versions.size(), 2);
  EXPECT_EQ(LineA()->versions[1].state, VersionState::kFailed);
}

TEST_F(TableRegistryTest, ReplacesContentASourceChangedUnderOneVersion) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  const TablePtr changed = MakeTable("a", "1", 1.25f);
  registry_->Sync("directory", SetOf({changed}));
  EXPECT_EQ(store_.Snapshot()->tables.at(0), changed);
}

TEST_F(TableRegistryTest, RollbackIsThePreviousActiveVersionInOneCall) {
  for (const char* version : {"1", "2", "3"}) {
    ASSERT_TRUE(Upload(version).ok());
    ASSERT_TRUE(Activate(version).ok());
  }
  const absl::StatusOr<WriteReceipt> receipt = registry_->Rollback("a", {});
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->previous_version, "3");
  EXPECT_EQ(Active(), "2");
  ASSERT_TRUE(registry_->Rollback("a", {}).ok());
  EXPECT_EQ(Active(), "1");
  EXPECT_EQ(registry_->Rollback("a", {}).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Active(), "1");
}

TEST_F(TableRegistryTest, RollbackAfterAnActivationGoesToWhatWasBeforeIt) {
  for (const char* version : {"1", "2"}) {
    ASSERT_TRUE(Upload(version).ok());
    ASSERT_TRUE(Activate(version).ok());
  }
  ASSERT_TRUE(registry_->Rollback("a", {}).ok());
  ASSERT_TRUE(Activate("2").ok());
  ASSERT_TRUE(registry_->Rollback("a", {}).ok());
  EXPECT_EQ(Active(), "1");
}

TEST_F(TableRegistryTest, RollbackBringsBackWhatItsSourceDropped) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  registry_->Sync("directory", SetOf({MakeTable("a", "2")}));
  ASSERT_EQ(Active(), "2");
  ASSERT_TRUE(registry_->Rollback("a", {}).ok());
  EXPECT_EQ(Active(), "1");
}

TEST_F(TableRegistryTest, RollbackOfAnUnknownLineListsThoseThereAre) {
  ASSERT_TRUE(Upload("1").ok());
  const absl::Status status = registry_->Rollback("b", {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("a"));
}

TEST_F(TableRegistryTest, HistorySaysWhoAndHow) {
  ASSERT_TRUE(Upload("1").ok());
  WriteContext context;
  context.actor = "alice";
  ASSERT_TRUE(registry_->Activate(Ref("a", "1"), "", context).ok());
  const std::vector<Activation> history = LineA()->assignment.history;
  ASSERT_EQ(history.size(), 1);
  EXPECT_EQ(history[0].actor, "alice");
  EXPECT_EQ(history[0].cause, "activate");
  EXPECT_EQ(history[0].target.version, "1");
}

TEST_F(TableRegistryTest, HistoryIsBounded) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(Upload("2").ok());
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(Activate(i % 2 == 0 ? "1" : "2").ok());
  EXPECT_EQ(LineA()->assignment.history.size(), kMaxHistory);
}

TEST_F(TableRegistryTest, ACanarySharesRequestsWithTheActiveVersion) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(Upload("2").ok());
  ASSERT_TRUE(Activate("1").ok());
  ASSERT_TRUE(registry_->SetCanary(Ref("a", "2"), 500, "", {}).ok());
  const tables::TableRoles roles = store_.Snapshot()->roles.at("a");
  EXPECT_EQ(roles.canary->identity().version, "2");
  EXPECT_EQ(roles.canary_basis_points, 500);
  EXPECT_EQ(roles.canary_salt, roles.canary->identity().digest);
  TableRef line;
  line.name = "a";
  ASSERT_TRUE(registry_->SetCanary(line, 0, "", {}).ok());
  EXPECT_TRUE(store_.Snapshot()->roles.empty());
}

TEST_F(TableRegistryTest, ActivatingTheCanaryEndsIt) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(Upload("2").ok());
  ASSERT_TRUE(Activate("1").ok());
  ASSERT_TRUE(registry_->SetCanary(Ref("a", "2"), 500, "", {}).ok());
  ASSERT_TRUE(Activate("2").ok());
  EXPECT_FALSE(LineA()->assignment.canary.has_value());
}

TEST_F(TableRegistryTest, RefusesACanaryWithoutAnActiveVersionOrAsTheActiveOne) {
  ASSERT_TRUE(Upload("1").ok());
  EXPECT_EQ(registry_->SetCanary(Ref("a", "1"), 500, "", {}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(Activate("1").ok());
  EXPECT_EQ(registry_->SetCanary(Ref("a", "1"), 500, "", {}).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(TableRegistryTest, RefusesACanaryOfAnotherModel) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(Activate("1").ok());
  tables::CompilerKvTableContent content = tables::UniformTable({.architecture = "other",
                                                                 .num_layers = 2,
                                                                 .num_qo_heads = 4,
                                                                 .num_kv_heads = 2,
                                                                 .head_dim = 8,
                                                                 .rope_theta = std::nullopt,
                                                                 .rope_json = "",
                                                                 .revision = ""},
                                                                1.0f, 0.9f);
  content.name = "a";
  content.version = "2";
  SourceTable other;
  other.table = *tables::ParseOwnedTable(*tables::SerializeTable(content), "other");
  other.origin = "upload";
  ASSERT_TRUE(registry_->Load(std::move(other), {}).ok());
  const absl::Status status = registry_->SetCanary(Ref("a", "2"), 500, "", {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("one model"));
}

TEST_F(TableRegistryTest, AliasesNameVersionsAndGoAgain) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(registry_->SetAlias("a", "next", Ref("", "1"), {}).ok());
  TableRef by_alias;
  by_alias.name = "a";
  by_alias.alias = "next";
  EXPECT_EQ(registry_->Find(by_alias)->version, "1");
  EXPECT_EQ(store_.Snapshot()->roles.at("a").aliases.at("next")->identity().version, "1");
  ASSERT_TRUE(registry_->SetAlias("a", "next", {}, {}).ok());
  EXPECT_EQ(registry_->Find(by_alias).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(TableRegistryTest, RefusesAliasesThatMeanSomethingElse) {
  ASSERT_TRUE(Upload("1").ok());
  for (const char* alias : {"stable", "canary", "", "with space", "\n"}) {
    EXPECT_EQ(registry_->SetAlias("a", alias, Ref("", "1"), {}).status().code(),
              absl::StatusCode::kInvalidArgument)
        << alias;
  }
}

TEST_F(TableRegistryTest, ActivateMaySetAnAliasInTheSameChange) {
  ASSERT_TRUE(Upload("1").ok());
  const uint64_t before = registry_->View()->revision;
  ASSERT_TRUE(registry_->Activate(Ref("a", "1"), "approved", {}).ok());
  EXPECT_EQ(registry_->View()->revision, before + 1);
  EXPECT_EQ(LineA()->assignment.aliases.at("approved").version, "1");
}

TEST_F(TableRegistryTest, UnloadIsRefusedWhileTheVersionIsInUse) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(Upload("2").ok());
  ASSERT_TRUE(Activate("1").ok());
  const auto code = [&](const char* version) {
    return registry_->Unload(Ref("a", version), {}).status().code();
  };
  EXPECT_EQ(code("1"), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(registry_->SetCanary(Ref("a", "2"), 1, "", {}).ok());
  EXPECT_EQ(code("2"), absl::StatusCode::kFailedPrecondition);
  TableRef line;
  line.name = "a";
  ASSERT_TRUE(registry_->SetCanary(line, 0, "", {}).ok());
  ASSERT_TRUE(registry_->SetAlias("a", "next", Ref("", "2"), {}).ok());
  EXPECT_EQ(code("2"), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(registry_->SetAlias("a", "next", {}, {}).ok());
  EXPECT_EQ(code("2"), absl::StatusCode::kOk);
  EXPECT_EQ(store_.Snapshot()->loaded.size(), 1);
}

TEST_F(TableRegistryTest, UnloadLeavesFilesToTheirSource) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1"), MakeTable("a", "2")}));
  const absl::Status status = registry_->Unload(Ref("a", "1"), {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("a-1.safetensors"));
}

TEST_F(TableRegistryTest, ComparesTheLinesRevisionBeforeAChange) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(Upload("2").ok());
  WriteContext context;
  context.expected_revision = LineA()->revision;
  ASSERT_TRUE(registry_->Activate(Ref("a", "1"), "", context).ok());
  const absl::Status stale = registry_->Activate(Ref("a", "2"), "", context).status();
  EXPECT_EQ(stale.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(Active(), "1");
}

TEST_F(TableRegistryTest, AnotherLinesChangeLeavesTheRevisionOfThisOne) {
  ASSERT_TRUE(Upload("1").ok());
  const uint64_t revision = LineA()->revision;
  registry_->Sync("directory", SetOf({MakeTable("b", "1")}));
  EXPECT_EQ(LineA()->revision, revision);
  EXPECT_GT(registry_->View()->revision, revision);
}

TEST_F(TableRegistryTest, FindsByDigestAndRefusesWhatIsAmbiguous) {
  const TablePtr table = MakeTable("a", "1");
  registry_->Sync("directory", SetOf({table, MakeTable("b", "1")}));
  TableRef digest;
  digest.digest = table->identity().digest;
  EXPECT_EQ(registry_->Find(digest)->name, "a");
  EXPECT_EQ(registry_->Find(Ref("", "1")).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(registry_->Find(Ref("a", "")).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(registry_->Find(Ref("a", "7")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(TableRegistryTest, AppliesASourcesAssignmentsWithItsTables) {
  SourceSet set = SetOf({MakeTable("a", "1"), MakeTable("a", "2")}, ActivationRule::kOnRequest);
  LineAssignment& wish = set.assignments["a"];
  wish.mode = LineMode::kChosen;
  wish.active = TargetOf(*set.tables[0].table);
  wish.canary = Canary{TargetOf(*set.tables[1].table), 100, "salt"};
  wish.aliases["next"] = TargetOf(*set.tables[1].table);
  const SyncOutcome outcome = registry_->Sync("etcd", std::move(set));
  EXPECT_TRUE(outcome.unresolved.empty());
  EXPECT_EQ(outcome.revision, 2);
  EXPECT_EQ(Active(), "1");
  EXPECT_EQ(LineA()->assignment.history.back().cause, "etcd");
  EXPECT_EQ(store_.Snapshot()->roles.at("a").canary->identity().version, "2");
}

TEST_F(TableRegistryTest, KeepsARoleWhoseNewTargetIsNotLoaded) {
  SourceSet set = SetOf({MakeTable("a", "1")}, ActivationRule::kOnRequest);
  set.assignments["a"].mode = LineMode::kChosen;
  set.assignments["a"].active = TargetOf(*set.tables[0].table);
  registry_->Sync("etcd", set);
  set.assignments["a"].active = TableTarget{"2", "sha256:00"};
  const SyncOutcome outcome = registry_->Sync("etcd", set);
  ASSERT_EQ(outcome.unresolved.size(), 1);
  EXPECT_THAT(outcome.unresolved[0], HasSubstr("sha256:00"));
  EXPECT_EQ(Active(), "1");
}

TEST_F(TableRegistryTest, ShowsValidatingAndFailedCandidates) {
  SourceSet set;
  SourceFailure validating;
  validating.origin = "new";
  SourceFailure failed;
  failed.origin = "bad";
  failed.why = absl::InvalidArgumentError("bad: no table");
  set.failures = {validating, failed};
  registry_->Sync("etcd", std::move(set));
  const auto view = registry_->View();
  ASSERT_EQ(view->nameless.size(), 2);
  EXPECT_EQ(view->nameless[0].state, VersionState::kFailed);
  EXPECT_EQ(view->nameless[0].reason, "bad: no table");
  EXPECT_EQ(view->nameless[1].state, VersionState::kValidating);
  EXPECT_EQ(observer_.refused().size(), 1);
}

TEST_F(TableRegistryTest, KeepsTheTablesOfASourceThatFails) {
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  registry_->SetSourceHealth("directory", absl::NotFoundError("gone"));
  EXPECT_EQ(Active(), "1");
  EXPECT_EQ(registry_->View()->sources.at(0).health.code(), absl::StatusCode::kNotFound);
  registry_->Sync("directory", SetOf({MakeTable("a", "1")}));
  EXPECT_TRUE(registry_->View()->sources.at(0).health.ok());
}

TEST_F(TableRegistryTest, ListenersGetEveryLaterViewInOrder) {
  std::vector<uint64_t> revisions;
  uint64_t id = 0;
  const auto first = registry_->Subscribe(
      &id, [&](std::shared_ptr<const RegistryView> view) { revisions.push_back(view->revision); });
  for (int i = 1; i <= 5; ++i) ASSERT_TRUE(Upload(absl::StrCat(i)).ok());
  registry_->Unsubscribe(id);
  ASSERT_TRUE(Upload("6").ok());
  ASSERT_EQ(revisions.size(), 5);
  for (size_t i = 0; i < revisions.size(); ++i) EXPECT_EQ(revisions[i], first->revision + 1 + i);
}

TEST_F(TableRegistryTest, ReadersSeeWholeChangesWhileWritersWork) {
  ASSERT_TRUE(Upload("1").ok());
  ASSERT_TRUE(Upload("2").ok());
  ASSERT_TRUE(Activate("1").ok());
  std::thread writer([&] {
    for (int i = 0; i < 200; ++i) {
      EXPECT_TRUE(registry_->Activate(Ref("a", i % 2 == 0 ? "2" : "1"), "both", {}).ok());
    }
  });
  uint64_t last = 0;
  for (int i = 0; i < 20000; ++i) {
    const auto snapshot = store_.Snapshot();
    ASSERT_GE(snapshot->revision, last);
    last = snapshot->revision;
    const auto roles = snapshot->roles.find("a");
    // The alias moves with the active version, in one swap.
    if (roles != snapshot->roles.end()) {
      ASSERT_EQ(roles->second.aliases.at("both"), snapshot->tables.at(0));
    }
  }
  writer.join();
}

TEST_F(TableRegistryTest, ForgetsTheOldestLinesNothingIsLoadedFor) {
  for (int i = 0; i < 100; ++i) {
    clock_.Advance(absl::Seconds(1));
    registry_->Sync("directory", SetOf({MakeTable(absl::StrCat("t", i), "1")}));
  }
  EXPECT_LE(registry_->View()->lines.size(), 65);
  EXPECT_TRUE(registry_->View()->lines.contains("t99"));
}

}  // namespace
}  // namespace keepset::service
