// Tables are swapped while streams work: no operation fails, none sees two tables.
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "keepset/v1/table.grpc.pb.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/server_fixture.h"
#include "tests/integration/table_answers.h"
#include "tests/integration/typed_worker.h"

namespace keepset::integration {
namespace {

constexpr int kStreams = 9;
constexpr int kSwaps = 110;
constexpr int64_t kBudget = 40;

bool IsActive(client::Client& client, const std::string& digest) {
  const absl::StatusOr<client::ServerInfo> info = client.GetServerInfo();
  if (!info.ok()) return false;
  for (const client::TableIdentity& table : info->tables) {
    if (table.digest == digest) return true;
  }
  return false;
}

TEST(ReloadUnderLoad, NoOperationFailsAndNoneMixesTables) {
  const fakes::SyntheticPrompt prompt({.num_layers = 2});
  const std::vector<client::LayerInput> layers = TypedLayers(prompt);
  std::vector<AnsweringTable> live;
  TablesByDigest by_digest;
  for (int i = 0; i <= kSwaps; ++i) {
    live.push_back(
        MakeAnsweringTable(prompt, "live", absl::StrCat(i), 0.80f + 0.001f * i, kBudget));
    by_digest[live.back().digest] = live.back();
  }
  const AnsweringTable pinned = MakeAnsweringTable(prompt, "pinned", "stays", 0.95f, kBudget);
  by_digest[pinned.digest] = pinned;
  for (int i = 1; i <= kSwaps; ++i) ASSERT_NE(live[i].taus, live[i - 1].taus);

  const fakes::ScratchDirectory tables;
  fakes::WriteAndRename(tables / "live.safetensors", live[0].file);
  fakes::WriteAndRename(tables / "pinned.safetensors", pinned.file);
  TestServer server(absl::StrCat("tables_directory: \"", tables.path(), "\""));
  client::OperationSpec by_name = TypedSpec(prompt, "compilerkv", kBudget);
  by_name.table.name = "live";
  client::OperationSpec by_pin = TypedSpec(prompt, "compilerkv", kBudget);
  by_pin.table.digest = pinned.digest;

  Findings findings;
  std::atomic<bool> stop = false;
  std::vector<std::thread> workers;
  for (int i = 0; i < kStreams; ++i) {
    const bool is_pinned = i == 0;
    workers.emplace_back([&, is_pinned] {
      const auto client = ConnectTo(server.address(), client::Transport::kInline);
      if (client == nullptr) return;
      const auto stream = client->OpenStream();
      EXPECT_TRUE(stream.ok()) << stream.status();
      while (stream.ok() && !stop.load()) {
        findings.Add(RunOnce(**stream, is_pinned ? by_pin : by_name, layers), by_digest,
                     is_pinned ? pinned.digest : "");
      }
    });
  }

  const auto client = ConnectTo(server.address(), client::Transport::kInline);
  const auto stream = client->OpenStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  for (int i = 1; i <= kSwaps && findings.first_complaint().empty(); ++i) {
    // Begun before the swap and given its layers after it. A stream is read in order: the answer of
    // the second operation shows that the first was begun.
    const absl::StatusOr<uint64_t> straddling = (*stream)->Begin(by_name);
    if (!straddling.ok()) {
      ADD_FAILURE() << straddling.status();
      break;
    }
    findings.Add(RunOnce(**stream, by_name, layers), by_digest, live[i - 1].digest);
    fakes::WriteAndRename(tables / "live.safetensors", live[i].file);
    EXPECT_TRUE(Eventually([&] { return IsActive(*client, live[i].digest); })) << "swap " << i;
    findings.Add(SendAndFinish(**stream, *straddling, layers), by_digest, live[i - 1].digest);
    // The next reply is the new table's.
    findings.Add(RunOnce(**stream, by_name, layers), by_digest, live[i].digest);
    const std::string version = absl::StrCat(i);
    EXPECT_TRUE(Eventually([&] { return findings.answers(version) > 1; })) << "swap " << i;
  }
  stop = true;
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(findings.first_complaint(), "");
  EXPECT_GT(findings.answers("stays"), 0);
}

TEST(ReloadUnderLoad, ActivationsAndRollbacksFailNothingAndMixNothing) {
  constexpr int kVersions = 4;
  constexpr int kChanges = 60;
  const fakes::SyntheticPrompt prompt({.num_layers = 2});
  const std::vector<client::LayerInput> layers = TypedLayers(prompt);
  TestServer server("table_writes: true");
  const auto tables = v1::TableService::NewStub(server.NewChannel());
  std::vector<AnsweringTable> versions;
  TablesByDigest by_digest;
  for (int i = 0; i < kVersions; ++i) {
    versions.push_back(
        MakeAnsweringTable(prompt, "live", absl::StrCat(i), 0.80f + 0.04f * i, kBudget));
    by_digest[versions.back().digest] = versions.back();
    v1::LoadTableRequest request;
    request.set_inline_(versions.back().file);
    v1::LoadTableResponse response;
    ASSERT_TRUE(tables->Load(NewContext().get(), request, &response).ok());
  }
  const auto activate = [&](const std::string& digest) {
    v1::ActivateTableRequest request;
    request.mutable_table()->set_digest(digest);
    v1::TableWriteResponse response;
    const grpc::Status status = tables->Activate(NewContext().get(), request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
  };
  activate(versions[0].digest);
  client::OperationSpec spec = TypedSpec(prompt, "compilerkv", kBudget);
  spec.table.name = "live";

  Findings findings;
  std::atomic<bool> stop = false;
  std::vector<std::thread> workers;
  for (int i = 0; i < 4; ++i) {
    workers.emplace_back([&] {
      const auto client = ConnectTo(server.address(), client::Transport::kInline);
      if (client == nullptr) return;
      const auto stream = client->OpenStream();
      EXPECT_TRUE(stream.ok()) << stream.status();
      while (stream.ok() && !stop.load()) {
        findings.Add(RunOnce(**stream, spec, layers), by_digest, "");
      }
    });
  }
  const auto client = ConnectTo(server.address(), client::Transport::kInline);
  const auto stream = client->OpenStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  for (int i = 1; i <= kChanges; ++i) {
    const AnsweringTable& next = versions[i % kVersions];
    activate(next.digest);
    // What began after the answer of a write sees it.
    findings.Add(RunOnce(**stream, spec, layers), by_digest, next.digest);
    v1::RollbackTableRequest request;
    request.set_name("live");
    v1::TableWriteResponse response;
    ASSERT_TRUE(tables->Rollback(NewContext().get(), request, &response).ok());
    findings.Add(RunOnce(**stream, spec, layers), by_digest, response.line().active_digest());
    activate(next.digest);
  }
  stop = true;
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(findings.first_complaint(), "");
}

}  // namespace
}  // namespace keepset::integration
