#include "service/registry/state_directory.h"

#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "service/registry/registry_changes.h"
#include "service/registry/registry_state.h"
#include "tests/service/registry/registry_fixture.h"

namespace keepset::service {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

// While it lives no file of this process grows beyond `bytes`: what a full disk does.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit = {bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_;
};

class StateDirectoryTest : public testing::Test {
 protected:
  // A server's registry with everything it stands on.
  struct Server {
    std::unique_ptr<StateDirectory> state;
    std::unique_ptr<TableLoader> loader;
    tables::TableStore store;
    fakes::FakeRegistryObserver observer;
    std::unique_ptr<TableRegistry> registry;
    std::unique_ptr<RegistryAuthority> authority;
  };

  std::unique_ptr<Server> Start() {
    auto server = std::make_unique<Server>();
    auto state = StateDirectory::Open(path_);
    EXPECT_TRUE(state.ok()) << state.status();
    server->state = *std::move(state);
    server->loader = NewMappingTableLoader(*server->state);
    server->registry = NewRegistry(server->store, clock_, &server->observer, server->state.get());
    if (server->registry != nullptr) {
      server->authority = NewLocalAuthority(*server->registry, *server->loader);
    }
    return server;
  }

  static absl::StatusOr<LoadReceipt> Upload(Server& server, const std::string& version,
                                            float head_weight = 1.0f) {
    LoadArgs args;
    args.bytes = fakes::TableBytes("a", version, head_weight);
    args.origin = "upload";
    return server.authority->Load(args, {});
  }

  int CountTableFiles() const {
    int count = 0;
    for (const auto& entry : fs::directory_iterator(path_)) {
      count += absl::EndsWith(entry.path().string(), ".safetensors") ? 1 : 0;
    }
    return count;
  }

  const fakes::ScratchDirectory scratch_;
  const std::string path_ = scratch_ / "state";
  fakes::FakeClock clock_;
};

TEST_F(StateDirectoryTest, IsCreatedForItsOwnerOnly) {
  const auto state = StateDirectory::Open(path_);
  ASSERT_TRUE(state.ok()) << state.status();
  struct stat info;
  ASSERT_EQ(stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700);
}

TEST_F(StateDirectoryTest, BelongsToOneServerAtATime) {
  {
    const auto first = StateDirectory::Open(path_);
    ASSERT_TRUE(first.ok()) << first.status();
    EXPECT_EQ(StateDirectory::Open(path_).status().code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(StateDirectory::Open(path_).ok());
}

TEST_F(StateDirectoryTest, RefusesAPathThatCannotBeADirectory) {
  fakes::WriteInPlace(scratch_ / "file", "x");
  EXPECT_FALSE(StateDirectory::Open(scratch_ / "file").ok());
  EXPECT_EQ(StateDirectory::Open(scratch_ / "none/state").status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(StateDirectoryTest, RestartBringsBackUploadsAndChoices) {
  {
    const auto server = Start();
    for (const char* version : {"1", "2", "3"}) ASSERT_TRUE(Upload(*server, version).ok());
    ASSERT_TRUE(server->registry->Activate(Ref("a", "1"), "first", {}).ok());
    ASSERT_TRUE(server->registry->Activate(Ref("a", "2"), "", {}).ok());
    ASSERT_TRUE(server->registry->SetCanary(Ref("a", "3"), 250, "salt", {}).ok());
  }
  const auto server = Start();
  const auto snapshot = server->store.Snapshot();
  ASSERT_EQ(snapshot->tables.size(), 1);
  EXPECT_EQ(snapshot->tables[0]->identity().version, "2");
  EXPECT_EQ(snapshot->loaded.size(), 3);
  EXPECT_EQ(snapshot->roles.at("a").canary->identity().version, "3");
  EXPECT_EQ(snapshot->roles.at("a").canary_salt, "salt");
  EXPECT_EQ(snapshot->roles.at("a").aliases.at("first")->identity().version, "1");
  ASSERT_TRUE(server->registry->Rollback("a", {}).ok());
  EXPECT_EQ(server->store.Snapshot()->tables[0]->identity().version, "1");
}

TEST_F(StateDirectoryTest, RestartNeverGivesARevisionOutTwice) {
  uint64_t last = 0;
  for (int i = 0; i < 3; ++i) {
    const auto server = Start();
    EXPECT_GT(server->registry->View()->revision, last);
    ASSERT_TRUE(Upload(*server, absl::StrCat(i)).ok());
    last = server->registry->View()->revision;
  }
}

TEST_F(StateDirectoryTest, RestartWithoutTheSourceDropsWhatWasItsAlone) {
  {
    const auto server = Start();
    server->registry->Sync("etcd", SetOf({MakeTable("b", "1")}));
    server->registry->Sync("directory", SetOf({MakeTable("a", "1")}));
    ASSERT_EQ(server->store.Snapshot()->tables.size(), 2);
  }
  // The fixture's registry has the source "directory" only.
  const auto server = Start();
  ASSERT_EQ(server->store.Snapshot()->tables.size(), 1);
  EXPECT_EQ(server->store.Snapshot()->tables[0]->identity().name, "a");
}

TEST_F(StateDirectoryTest, ADamagedTableFileIsLeftOutAndTold) {
  std::string digest;
  {
    const auto server = Start();
    ASSERT_TRUE(Upload(*server, "1").ok());
    digest = Upload(*server, "2")->version.digest;
    ASSERT_TRUE(server->registry->Activate(Ref("a", "1"), "", {}).ok());
  }
  const std::string file = absl::StrCat(path_, "/sha256-", digest.substr(7), ".safetensors");
  fs::resize_file(file, fs::file_size(file) - 1);
  const auto server = Start();
  EXPECT_EQ(server->store.Snapshot()->loaded.size(), 1);
  ASSERT_FALSE(server->observer.health().empty());
  EXPECT_EQ(server->observer.health()[0].file, "state");
  EXPECT_EQ(server->observer.health()[0].why.code(), absl::StatusCode::kDataLoss);
}

TEST_F(StateDirectoryTest, ATableFileWithOtherContentIsToldByItsDigest) {
  std::string digest;
  {
    const auto server = Start();
    digest = Upload(*server, "1")->version.digest;
  }
  fakes::WriteAndRename(absl::StrCat(path_, "/sha256-", digest.substr(7), ".safetensors"),
                        fakes::TableBytes("a", "1", 1.25f));
  const auto server = Start();
  EXPECT_TRUE(server->store.Snapshot()->loaded.empty());
  EXPECT_THAT(std::string(server->observer.health().at(0).why.message()), HasSubstr(digest));
}

TEST_F(StateDirectoryTest, ADamagedDocumentStopsTheStart) {
  {
    const auto server = Start();
    ASSERT_TRUE(Upload(*server, "1").ok());
  }
  fs::resize_file(path_ + "/registry.json", fs::file_size(path_ + "/registry.json") / 2);
  const auto state = StateDirectory::Open(path_);
  ASSERT_TRUE(state.ok());
  tables::TableStore store;
  TableRegistryOptions options;
  options.store = &store;
  options.clock = &clock_;
  options.state = state->get();
  const absl::Status status = TableRegistry::New(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("registry.json"));
}

TEST_F(StateDirectoryTest, AHalfWrittenDocumentLeavesTheOldOne) {
  {
    const auto server = Start();
    ASSERT_TRUE(Upload(*server, "1").ok());
    ASSERT_TRUE(server->registry->Activate(Ref("a", "1"), "", {}).ok());
  }
  // What a server that ends while it writes leaves behind.
  fakes::WriteInPlace(path_ + "/.keepset-0123456789abcdef.tmp", "{\"format\": \"keep");
  const auto server = Start();
  EXPECT_EQ(server->store.Snapshot()->tables.size(), 1);
  EXPECT_FALSE(fs::exists(path_ + "/.keepset-0123456789abcdef.tmp"));
}

TEST_F(StateDirectoryTest, AFullDiskRefusesTheUploadAndChangesNothing) {
  const auto server = Start();
  ASSERT_TRUE(Upload(*server, "1").ok());
  const uint64_t revision = server->registry->View()->revision;
  {
    const FileSizeLimit full(16);
    const absl::Status status = Upload(*server, "2").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  }
  EXPECT_EQ(server->registry->View()->revision, revision);
  EXPECT_EQ(server->store.Snapshot()->loaded.size(), 1);
  EXPECT_EQ(CountTableFiles(), 1);
  EXPECT_TRUE(Upload(*server, "2").ok());
}

TEST_F(StateDirectoryTest, AFullDiskRefusesAnActivationAndChangesNothing) {
  const auto server = Start();
  ASSERT_TRUE(Upload(*server, "1").ok());
  {
    const FileSizeLimit full(16);
    EXPECT_EQ(server->registry->Activate(Ref("a", "1"), "", {}).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
  EXPECT_TRUE(server->store.Snapshot()->tables.empty());
  EXPECT_TRUE(server->registry->Activate(Ref("a", "1"), "", {}).ok());
}

TEST_F(StateDirectoryTest, AFullDiskDoesNotStopASourceAndIsTold) {
  const auto server = Start();
  {
    const FileSizeLimit full(16);
    server->registry->Sync("directory", SetOf({MakeTable("a", "1")}));
  }
  EXPECT_EQ(server->store.Snapshot()->tables.size(), 1);
  EXPECT_TRUE(server->observer.WaitForHealth("state", absl::StatusCode::kResourceExhausted));
  EXPECT_FALSE(server->registry->View()->lines.at("a")->versions.at(0).durable);
  server->registry->Sync("directory", SetOf({MakeTable("a", "1"), MakeTable("a", "2")}));
  EXPECT_TRUE(server->observer.WaitForHealth("state", absl::StatusCode::kOk));
}

TEST_F(StateDirectoryTest, UnloadRemovesTheFile) {
  const auto server = Start();
  ASSERT_TRUE(Upload(*server, "1").ok());
  ASSERT_EQ(CountTableFiles(), 1);
  ASSERT_TRUE(server->registry->Unload(Ref("a", "1"), {}).ok());
  EXPECT_EQ(CountTableFiles(), 0);
}

TEST_F(StateDirectoryTest, ARefusedUploadLeavesNoFile) {
  const auto server = Start();
  ASSERT_TRUE(Upload(*server, "1").ok());
  EXPECT_EQ(Upload(*server, "1", 1.25f).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(CountTableFiles(), 1);
  LoadArgs wrong;
  wrong.bytes = fakes::TableBytes("a", "2");
  wrong.origin = "upload";
  wrong.expected_digest = "sha256:00";
  EXPECT_EQ(server->authority->Load(wrong, {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CountTableFiles(), 1);
}

// As an authority's load that etcd refuses, and a table whose name is not its key's.
TEST_F(StateDirectoryTest, ATableThatNobodyTookLeavesNoFile) {
  const auto server = Start();
  auto table = server->loader->LoadTable({fakes::TableBytes("a", "1"), "etcd", ""});
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(CountTableFiles(), 1);
  table = absl::CancelledError("");
  EXPECT_EQ(CountTableFiles(), 0);
}

TEST_F(StateDirectoryTest, AContentOfTheSourceThatTheRegistryRefusesLeavesNoFile) {
  const auto server = Start();
  ASSERT_TRUE(Upload(*server, "1").ok());
  {
    SourceSet set;
    auto table = server->loader->LoadTable({fakes::TableBytes("a", "1", 1.25f), "file", ""});
    ASSERT_TRUE(table.ok()) << table.status();
    EXPECT_EQ(CountTableFiles(), 2);
    set.tables.push_back({*std::move(table), "file"});
    server->registry->Sync("directory", std::move(set));
  }
  EXPECT_EQ(CountTableFiles(), 1);
}

TEST_F(StateDirectoryTest, ContentThatTheRegistryHoldsStaysWhoeverLetsGoOfIt) {
  const auto server = Start();
  ASSERT_TRUE(Upload(*server, "1").ok());
  { const auto again = server->loader->LoadTable({fakes::TableBytes("a", "1"), "file", ""}); }
  EXPECT_EQ(CountTableFiles(), 1);
}

TEST_F(StateDirectoryTest, FilesOfHeldTablesSurviveTheServer) {
  {
    const auto server = Start();
    ASSERT_TRUE(Upload(*server, "1").ok());
  }
  EXPECT_EQ(CountTableFiles(), 1);
}

// /proc/self/mem is a file whose beginning cannot be read.
TEST_F(StateDirectoryTest, ADocumentThatCannotBeReadIsAnError) {
  const auto state = StateDirectory::Open(path_);
  ASSERT_TRUE(state.ok()) << state.status();
  fs::create_symlink("/proc/self/mem", path_ + "/registry.json");
  absl::Status status;
  EXPECT_NO_THROW(status = (*state)->ReadDocument().status());
  EXPECT_THAT(std::string(status.message()), HasSubstr("registry.json"));
}

TEST_F(StateDirectoryTest, UploadsAreDurableAndTheSameContentIsOneTable) {
  const auto server = Start();
  const absl::StatusOr<LoadReceipt> first = Upload(*server, "1");
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_TRUE(first->durable);
  EXPECT_FALSE(first->already_loaded);
  const absl::StatusOr<LoadReceipt> second = Upload(*server, "1");
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_TRUE(second->already_loaded);
  EXPECT_EQ(first->version.table, second->version.table);
}

TEST(RegistryDocument, ReadsBackWhatItWrote) {
  RegistryDocument document;
  document.revision_limit = 17;
  const TableTarget target = {"1", absl::StrCat("sha256:", std::string(64, 'a'))};
  LineAssignment& line = document.lines["name/with:odd@characters"];
  line.mode = LineMode::kChosen;
  line.active = target;
  line.canary = Canary{target, 1, "salt"};
  line.aliases["next"] = target;
  line.history.push_back({target, absl::FromUnixMicros(5), "actor \"quoted\"\n", "activate", true});
  StoredTable stored;
  stored.name = "a";
  stored.target = target;
  stored.holders["directory"] = {"a.safetensors", ActivationRule::kNewest};
  stored.loaded = absl::FromUnixMicros(6);
  document.shared = SharedRevisions{"etcd", 12, {{"name/with:odd@characters", 11}}};
  document.tables.push_back(stored);
  const absl::StatusOr<RegistryDocument> back =
      ParseRegistryDocument(SerializeRegistryDocument(document), "test");
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, document);
}

TEST(RegistryDocument, RefusesDigestsThatWouldLeaveTheDirectory) {
  RegistryDocument document;
  StoredTable stored;
  stored.name = "a";
  stored.target = {"1", "sha256:../../etc/passwd"};
  document.tables.push_back(stored);
  EXPECT_EQ(ParseRegistryDocument(SerializeRegistryDocument(document), "test").status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(RegistryDocument, RefusesANewerVersion) {
  std::string text = SerializeRegistryDocument({});
  const size_t at = text.find("\"format_version\": 1");
  ASSERT_NE(at, std::string::npos);
  text.replace(at, 19, "\"format_version\": 2");
  EXPECT_EQ(ParseRegistryDocument(text, "test").status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(RegistryDocument, RefusesEveryTruncation) {
  RegistryDocument document;
  document.lines["a"].history.push_back({{"1", absl::StrCat("sha256:", std::string(64, 'a'))},
                                         absl::UnixEpoch(),
                                         "",
                                         "newest",
                                         false});
  const std::string text = SerializeRegistryDocument(document);
  for (size_t size = 0; size + 1 < text.size(); ++size) {
    EXPECT_FALSE(ParseRegistryDocument(text.substr(0, size), "test").ok()) << size;
  }
}

}  // namespace
}  // namespace keepset::service
