// The source and its authority against the real etcd: what servers serve and say while etcd is
// changed, damaged, killed and wiped.
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/registry/etcd/etcd_layout.h"
#include "service/registry/source_registry.h"
#include "service/registry/state_directory.h"
#include "service/registry/table_registry.h"
#include "tests/fakes/await_view.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/etcd_server.h"

namespace keepset::service {
namespace {

using fakes::DigestOf;
using fakes::TableBytes;
using integration::EtcdServer;
using testing::ElementsAre;
using testing::HasSubstr;

// One server's registry with the etcd source, as keepsetd wires it.
class Fleetmate {
 public:
  explicit Fleetmate(const EtcdSourceOptions& options, const std::string& state_directory = "") {
    if (!state_directory.empty()) {
      auto state = StateDirectory::Open(state_directory);
      EXPECT_TRUE(state.ok()) << state.status();
      state_ = *std::move(state);
    }
    auto registry = TableRegistry::New({.store = &store_,
                                        .clock = &SystemClock(),
                                        .observer = nullptr,
                                        .state = state_.get(),
                                        .sources = {"etcd"}});
    EXPECT_TRUE(registry.ok()) << registry.status();
    registry_ = *std::move(registry);
    TableSourceOptions all;
    all.etcd = options;
    auto source = NewTableSource(
        "etcd", all, {.registry = *registry_, .loader = *loader_, .clock = SystemClock()});
    EXPECT_TRUE(source.ok()) << source.status();
    source_ = *std::move(source);
  }

  absl::Status Start() { return source_->Start(); }
  TableRegistry& registry() { return *registry_; }
  RegistryAuthority& authority() { return *source_->authority(); }

  bool Await(const std::function<bool(const RegistryView&)>& done) {
    return fakes::AwaitView(*registry_, done);
  }
  bool AwaitActive(const std::string& name, const std::string& version) {
    return Await([&](const RegistryView& view) { return ActiveOf(view, name) == version; });
  }
  bool AwaitHealth(absl::StatusCode code) {
    return Await([&](const RegistryView& view) { return HealthOf(view).code() == code; });
  }
  bool AwaitFailure(const std::string& part) {
    return Await([&](const RegistryView& view) {
      for (const auto& [name, line] : view.lines) {
        for (const TableVersionInfo& version : line->versions) {
          if (version.state == VersionState::kFailed && Contains(version.reason, part)) return true;
        }
      }
      for (const TableVersionInfo& version : view.nameless) {
        if (version.state == VersionState::kFailed && Contains(version.reason, part)) return true;
      }
      return false;
    });
  }

  std::string Active(const std::string& name) { return ActiveOf(*registry_->View(), name); }
  absl::Status Health() { return HealthOf(*registry_->View()); }
  // Versions that operations see as active, in order of table names.
  std::vector<std::string> Served() {
    std::vector<std::string> versions;
    const auto snapshot = store_.Snapshot();
    for (const auto& table : snapshot->tables) {
      versions.push_back(absl::StrCat(table->identity().name, "@", table->identity().version));
    }
    return versions;
  }

 private:
  static bool Contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }
  static std::string ActiveOf(const RegistryView& view, const std::string& name) {
    const auto line = view.lines.find(name);
    if (line == view.lines.end() || !line->second->assignment.active) return "";
    return line->second->assignment.active->version;
  }
  static absl::Status HealthOf(const RegistryView& view) {
    for (const SourceView& source : view.sources) {
      if (source.source == "etcd") return source.health;
    }
    return absl::NotFoundError("the source has said nothing yet");
  }

  tables::TableStore store_;
  std::unique_ptr<StateDirectory> state_;
  std::unique_ptr<TableRegistry> registry_;
  const std::unique_ptr<TableLoader> loader_ = NewTableLoader();
  std::unique_ptr<TableSource> source_;
};

std::string Stable(const std::string& version) {
  return absl::StrCat(R"({"stable": {"version": ")", version, R"("}})");
}

TableRef Version(const std::string& name, const std::string& version) {
  TableRef ref;
  ref.name = name;
  ref.version = version;
  return ref;
}

LoadArgs Upload(std::string bytes) {
  LoadArgs args;
  args.bytes = std::move(bytes);
  args.origin = "upload";
  return args;
}

WriteContext By(const std::string& actor, uint64_t expected_revision = 0) {
  WriteContext context;
  context.actor = actor;
  context.expected_revision = expected_revision;
  return context;
}

class EtcdSourceTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(server_.Start()); }

  EtcdSourceOptions Options() const {
    EtcdSourceOptions options;
    options.client.endpoints = {server_.endpoint()};
    options.prefix = "/k";
    options.shared_directory = shared_.path();
    options.file_retry = absl::Milliseconds(10);
    options.first_pause = absl::Milliseconds(10);
    options.last_pause = absl::Milliseconds(50);
    return options;
  }

  std::unique_ptr<Fleetmate> Join(const std::string& state_directory = "") {
    auto mate = std::make_unique<Fleetmate>(Options(), state_directory);
    const absl::Status started = mate->Start();
    EXPECT_TRUE(started.ok()) << started;
    return mate;
  }

  // Version "1" of table "a" active, "2" loaded.
  void PutTwoVersions() {
    server_.PutAll({{"/k/tables/a/1", TableBytes("a", "1")},
                    {"/k/tables/a/2", TableBytes("a", "2")},
                    {"/k/lines/a", Stable("1")}});
  }

  const fakes::ScratchDirectory shared_;
  EtcdServer server_;
};

TEST_F(EtcdSourceTest, ServesWhatEtcdHoldsWhenStartReturns) {
  PutTwoVersions();
  const auto mate = Join();
  EXPECT_EQ(mate->Active("a"), "1");
  EXPECT_TRUE(mate->Health().ok()) << mate->Health();
}

TEST_F(EtcdSourceTest, AppliesAllOfOneRevisionInOneChange) {
  const auto mate = Join();
  std::vector<std::string> states;
  uint64_t id = 0;
  absl::Mutex mutex;
  mate->registry().Subscribe(&id, [&](std::shared_ptr<const RegistryView> view) {
    absl::MutexLock lock(&mutex);
    states.push_back(
        absl::StrCat(view->lines.contains("a") && view->lines.at("a")->assignment.active
                         ? view->lines.at("a")->assignment.active->version
                         : "none",
                     " ", view->lines.contains("b") ? "b" : "no b"));
  });
  server_.PutAll({{"/k/tables/a/1", TableBytes("a", "1")},
                  {"/k/tables/b/1", TableBytes("b", "1")},
                  {"/k/lines/a", Stable("1")},
                  {"/k/lines/b", Stable("1")}});
  ASSERT_TRUE(mate->AwaitActive("b", "1"));
  mate->registry().Unsubscribe(id);
  for (const std::string& state : states) {
    EXPECT_THAT(state, testing::AnyOf("none no b", "1 b"));
  }
}

TEST_F(EtcdSourceTest, FollowsWhatOthersDecide) {
  PutTwoVersions();
  const auto mate = Join();
  server_.Put("/k/lines/a", Stable("2"));
  EXPECT_TRUE(mate->AwaitActive("a", "2"));
  server_.Delete("/k/lines/a");
  EXPECT_TRUE(mate->AwaitActive("a", ""));
}

TEST_F(EtcdSourceTest, KeepsTheLastGoodTableOfADamagedValueAndSaysWhy) {
  PutTwoVersions();
  const auto mate = Join();
  server_.Put("/k/tables/a/1", TableBytes("a", "1").substr(0, 100));
  EXPECT_TRUE(mate->AwaitFailure("/k/tables/a/1"));
  EXPECT_THAT(mate->Served(), ElementsAre("a@1"));
}

TEST_F(EtcdSourceTest, KeepsWhatIsActiveWhenALineBecomesGarbage) {
  PutTwoVersions();
  const auto mate = Join();
  server_.Put("/k/lines/a", "garbage");
  EXPECT_TRUE(mate->AwaitFailure("/k/lines/a"));
  EXPECT_EQ(mate->Active("a"), "1");
}

TEST_F(EtcdSourceTest, RefusesAnOversizedValue) {
  EtcdSourceOptions options = Options();
  options.max_value_bytes = 100;
  PutTwoVersions();
  Fleetmate mate(options);
  ASSERT_TRUE(mate.Start().ok());
  EXPECT_TRUE(mate.AwaitFailure("max_value_bytes"));
  EXPECT_TRUE(mate.Served().empty());
}

TEST_F(EtcdSourceTest, TakesAFileOnceItHasTheRightDigest) {
  const std::string bytes = TableBytes("a", "1");
  fakes::WriteInPlace(shared_ / "a", TableBytes("a", "1", 1.25f));
  server_.PutAll(
      {{"/k/tables/a/1", etcd::SerializeTablePointer({.digest = DigestOf(bytes), .path = "a"})},
       {"/k/lines/a", Stable("1")}});
  const auto mate = Join();
  EXPECT_TRUE(mate->AwaitFailure("digest"));
  EXPECT_EQ(mate->Active("a"), "");
  fakes::WriteAndRename(shared_ / "a", bytes);
  EXPECT_TRUE(mate->AwaitActive("a", "1"));
}

TEST_F(EtcdSourceTest, ServesOnWhileEtcdIsKilledAndComesBack) {
  PutTwoVersions();
  const auto mate = Join();
  server_.Kill();
  ASSERT_TRUE(mate->AwaitHealth(absl::StatusCode::kUnavailable));
  EXPECT_THAT(std::string(mate->Health().message()), HasSubstr("serving what etcd said"));
  EXPECT_THAT(mate->Served(), ElementsAre("a@1"));
  ASSERT_TRUE(server_.Start());
  server_.Put("/k/lines/a", Stable("2"));
  EXPECT_TRUE(mate->AwaitActive("a", "2"));
  EXPECT_TRUE(mate->AwaitHealth(absl::StatusCode::kOk));
}

TEST_F(EtcdSourceTest, CatchesUpAfterACompaction) {
  PutTwoVersions();
  const auto mate = Join();
  server_.Kill();
  ASSERT_TRUE(server_.Start(EtcdServer::Listen::kAdminOnly));
  server_.Put("/k/lines/a", Stable("2"));
  server_.Delete("/k/tables/a/1");
  server_.Compact();
  server_.Kill();
  ASSERT_TRUE(server_.Start());
  EXPECT_TRUE(mate->AwaitActive("a", "2"));
  EXPECT_TRUE(mate->Await([](const RegistryView& view) {
    for (const TableVersionInfo& version : view.lines.at("a")->versions) {
      if (version.version == "1" && version.state != VersionState::kRetired) return false;
    }
    return true;
  }));
}

TEST_F(EtcdSourceTest, ServesNothingAndSaysSoWithoutEtcdAndWithoutState) {
  server_.Kill();
  const auto mate = Join();
  EXPECT_TRUE(mate->AwaitHealth(absl::StatusCode::kUnavailable));
  EXPECT_TRUE(mate->Served().empty());
  ASSERT_TRUE(server_.Start());
  PutTwoVersions();
  EXPECT_TRUE(mate->AwaitActive("a", "1"));
}

TEST_F(EtcdSourceTest, RestartedWithoutEtcdItServesFromItsStateDirectory) {
  const fakes::ScratchDirectory state;
  PutTwoVersions();
  Join(state.path());
  server_.Kill();
  const auto mate = Join(state.path());
  EXPECT_THAT(mate->Served(), ElementsAre("a@1"));
  EXPECT_TRUE(mate->AwaitHealth(absl::StatusCode::kUnavailable));
  EXPECT_THAT(std::string(mate->Health().message()), HasSubstr("kept on disk"));
  ASSERT_TRUE(server_.Start());
  server_.Put("/k/lines/a", Stable("2"));
  EXPECT_TRUE(mate->AwaitActive("a", "2"));
}

TEST_F(EtcdSourceTest, ForgetsOnDiskWhatEtcdDroppedWhileItWasDown) {
  const fakes::ScratchDirectory state;
  server_.PutAll({{"/k/tables/a/1", TableBytes("a", "1")},
                  {"/k/tables/b/1", TableBytes("b", "1")},
                  {"/k/lines/a", Stable("1")},
                  {"/k/lines/b", Stable("1")}});
  Join(state.path());
  server_.Delete("/k/lines/b");
  server_.Delete("/k/tables/b/1");
  const auto mate = Join(state.path());
  EXPECT_THAT(mate->Served(), ElementsAre("a@1"));
}

TEST_F(EtcdSourceTest, KeepsItsTablesWhenEtcdIsWiped) {
  PutTwoVersions();
  const auto mate = Join();
  server_.EraseData();
  ASSERT_TRUE(server_.Start());
  ASSERT_TRUE(mate->AwaitHealth(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(std::string(mate->Health().message()), HasSubstr("holds nothing below"));
  EXPECT_THAT(mate->Served(), ElementsAre("a@1"));
  PutTwoVersions();
  server_.Put("/k/lines/a", Stable("2"));
  EXPECT_TRUE(mate->AwaitActive("a", "2"));
  EXPECT_TRUE(mate->AwaitHealth(absl::StatusCode::kOk));
}

TEST_F(EtcdSourceTest, RefusesOptionsItCannotUse) {
  EtcdSourceOptions options = Options();
  options.client.endpoints = {"nonsense"};
  Fleetmate mate(options);
  EXPECT_TRUE(absl::IsInvalidArgument(mate.Start()));
}

// ---- writes

TEST_F(EtcdSourceTest, WritesThroughOneServerReachTheOther) {
  const auto one = Join();
  const auto other = Join();
  const auto loaded = one->authority().Load(Upload(TableBytes("a", "1")), By("ops"));
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->version.state, VersionState::kReady);
  EXPECT_TRUE(loaded->durable);
  const auto active = one->authority().Activate(Version("a", "1"), "night", By("ops"));
  ASSERT_TRUE(active.ok()) << active.status();
  EXPECT_EQ(active->line->assignment.active->version, "1");
  EXPECT_EQ(one->Active("a"), "1") << "the answer comes when this server has it";
  ASSERT_TRUE(other->AwaitActive("a", "1"));
  const auto line = other->registry().View()->lines.at("a");
  EXPECT_EQ(line->assignment.aliases.at("night").version, "1");
  ASSERT_EQ(line->assignment.history.size(), 1);
  EXPECT_EQ(line->assignment.history[0].actor, "ops");
  EXPECT_EQ(line->assignment.history[0].cause, "activate");
}

TEST_F(EtcdSourceTest, RollsBackThroughAnotherServer) {
  PutTwoVersions();
  const auto one = Join();
  const auto other = Join();
  ASSERT_TRUE(one->authority().Activate(Version("a", "2"), "", By("x")).ok());
  ASSERT_TRUE(one->authority().Activate(Version("a", "1"), "", By("x")).ok());
  ASSERT_TRUE(one->authority().Activate(Version("a", "2"), "", By("x")).ok());
  const auto back = other->authority().Rollback("a", By("y"));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->previous_version, "2");
  EXPECT_EQ(other->Active("a"), "1");
  EXPECT_TRUE(one->AwaitActive("a", "1"));
}

TEST_F(EtcdSourceTest, SetsAndEndsACanary) {
  PutTwoVersions();
  const auto one = Join();
  const auto other = Join();
  const auto set = one->authority().SetCanary(Version("a", "2"), 2500, "s", By("x"));
  ASSERT_TRUE(set.ok()) << set.status();
  ASSERT_TRUE(other->Await([](const RegistryView& view) {
    const auto& canary = view.lines.at("a")->assignment.canary;
    return canary.has_value() && canary->basis_points == 2500 && canary->salt == "s" &&
           canary->target.version == "2";
  }));
  ASSERT_TRUE(other->authority().SetCanary(Version("a", ""), 0, "", By("x")).ok());
  EXPECT_TRUE(one->Await(
      [](const RegistryView& view) { return !view.lines.at("a")->assignment.canary.has_value(); }));
}

TEST_F(EtcdSourceTest, UnloadsWhatNothingNames) {
  PutTwoVersions();
  const auto mate = Join();
  const auto in_use = mate->authority().Unload(Version("a", "1"), By("x"));
  EXPECT_TRUE(absl::IsFailedPrecondition(in_use.status())) << in_use.status();
  const auto gone = mate->authority().Unload(Version("a", "2"), By("x"));
  ASSERT_TRUE(gone.ok()) << gone.status();
  EXPECT_EQ(server_.Get("/k/tables/a/2"), "");
  EXPECT_FALSE(mate->registry().Find(Version("a", "2")).ok());
}

TEST_F(EtcdSourceTest, PutsALargeUploadOnTheSharedVolume) {
  EtcdSourceOptions options = Options();
  options.max_value_bytes = 100;
  Fleetmate one(options);
  Fleetmate other(options);
  ASSERT_TRUE(one.Start().ok());
  ASSERT_TRUE(other.Start().ok());
  const std::string bytes = TableBytes("a", "1");
  const auto loaded = one.authority().Load(Upload(bytes), By("x"));
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_THAT(server_.Get("/k/tables/a/1"), HasSubstr(DigestOf(bytes)));
  ASSERT_TRUE(one.authority().Activate(Version("a", "1"), "", By("x")).ok());
  EXPECT_TRUE(other.AwaitActive("a", "1"));
}

TEST_F(EtcdSourceTest, RefusesALargeUploadWithoutASharedVolume) {
  EtcdSourceOptions options = Options();
  options.max_value_bytes = 100;
  options.shared_directory = "";
  Fleetmate mate(options);
  ASSERT_TRUE(mate.Start().ok());
  const auto loaded = mate.authority().Load(Upload(TableBytes("a", "1")), By("x"));
  EXPECT_TRUE(absl::IsResourceExhausted(loaded.status())) << loaded.status();
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("shared_directory"));
}

TEST_F(EtcdSourceTest, RefusesOtherContentUnderAVersionThatIsThere) {
  PutTwoVersions();
  const auto mate = Join();
  const auto again = mate->authority().Load(Upload(TableBytes("a", "1")), By("x"));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->already_loaded);
  const auto other = mate->authority().Load(Upload(TableBytes("a", "1", 1.25f)), By("x"));
  EXPECT_EQ(other.status().code(), absl::StatusCode::kAlreadyExists) << other.status();
  const auto damaged = mate->authority().Load(Upload("no table"), By("x"));
  EXPECT_TRUE(absl::IsInvalidArgument(damaged.status())) << damaged.status();
}

TEST_F(EtcdSourceTest, RefusesWhatExpectsAnOlderLine) {
  PutTwoVersions();
  const auto mate = Join();
  const uint64_t seen = mate->registry().View()->lines.at("a")->revision;
  ASSERT_TRUE(mate->authority().Activate(Version("a", "2"), "", By("x", seen)).ok());
  const auto late = mate->authority().Activate(Version("a", "1"), "", By("x", seen));
  EXPECT_TRUE(absl::IsAborted(late.status())) << late.status();
  EXPECT_EQ(mate->Active("a"), "2");
}

TEST_F(EtcdSourceTest, IsUnavailableForWritesWhileEtcdIsDownAndSaysWhatHelps) {
  PutTwoVersions();
  const auto mate = Join();
  server_.Kill();
  const auto write = mate->authority().Activate(Version("a", "2"), "", By("x"));
  EXPECT_TRUE(absl::IsUnavailable(write.status())) << write.status();
  EXPECT_THAT(std::string(write.status().message()), HasSubstr("when etcd answers"));
  EXPECT_EQ(mate->Active("a"), "1");
}

TEST_F(EtcdSourceTest, TwoServersThatWriteAtOnceConverge) {
  PutTwoVersions();
  const auto one = Join();
  const auto other = Join();
  constexpr int kRounds = 20;
  const auto swap = [](Fleetmate& mate, const std::string& alias) {
    for (int i = 0; i < kRounds; ++i) {
      const std::string version = i % 2 == 0 ? "2" : "1";
      const auto write = mate.authority().SetAlias("a", alias, Version("", version), By(alias));
      EXPECT_TRUE(write.ok()) << write.status();
    }
  };
  std::thread first([&] { swap(*one, "first"); });
  std::thread second([&] { swap(*other, "second"); });
  first.join();
  second.join();
  const auto complete = [](const RegistryView& view) {
    const auto& aliases = view.lines.at("a")->assignment.aliases;
    return aliases.size() == 2 && aliases.at("first").version == "1" &&
           aliases.at("second").version == "1";
  };
  EXPECT_TRUE(one->Await(complete));
  EXPECT_TRUE(other->Await(complete));
}

}  // namespace
}  // namespace keepset::service
