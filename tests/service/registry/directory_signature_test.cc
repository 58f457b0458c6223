// A directory of signed tables: NAME.safetensors and NAME.safetensors.sig beside it.
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "base/clock.h"
#include "gtest/gtest.h"
#include "service/registry/signature_loader.h"
#include "service/registry/table_registry.h"
#include "service/registry/table_source.h"
#include "tables/table_signature.h"
#include "tests/fakes/fake_registry_observer.h"
#include "tests/fakes/signing_key.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

class SignedDirectory : public ::testing::Test {
 protected:
  void Start() {
    auto keys = tables::TrustedKeys::Parse(alice_.public_pem, "alice");
    ASSERT_TRUE(keys.ok()) << keys.status();
    loader_ = NewSignatureLoader(NewTableLoader(), *std::move(keys), SignatureRule::kRequired);
    DirectorySourceOptions options;
    options.directory = directory_.path();
    options.debounce = absl::Milliseconds(1);
    source_ =
        NewDirectorySource({.directory = options},
                           {.registry = *registry_, .loader = *loader_, .clock = SystemClock()});
    const absl::Status status = source_->Start();
    ASSERT_TRUE(status.ok()) << status;
  }
  std::string Signature(const std::string& bytes, const fakes::SigningKey& by) {
    return tables::SignBytes(
               absl::MakeConstSpan(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()),
               by.private_path)
        .value_or("");
  }
  void Write(const std::string& bytes) { fakes::WriteAndRename(file_, bytes); }
  void WriteSignature(const std::string& bytes, const fakes::SigningKey& by) {
    fakes::WriteAndRename(file_ + ".sig", Signature(bytes, by));
  }
  // Refusals whose message holds `part`.
  bool WasRefusedFor(const std::string& part) {
    for (const auto& refusal : observer_.refused()) {
      if (absl::StrContains(refusal.why.message(), part) &&
          refusal.why.code() == absl::StatusCode::kPermissionDenied) {
        return true;
      }
    }
    return false;
  }

  const fakes::ScratchDirectory directory_;
  const fakes::ScratchDirectory keys_;
  const fakes::SigningKey alice_ = fakes::NewSigningKey(keys_.path(), "alice");
  const fakes::SigningKey mallory_ = fakes::NewSigningKey(keys_.path(), "mallory");
  const std::string file_ = directory_ / "a.safetensors";
  const std::string first_ = fakes::TableBytes("a", "1");
  const std::string second_ = fakes::TableBytes("a", "2");
  tables::TableStore store_;
  fakes::FakeRegistryObserver observer_;
  const std::unique_ptr<TableRegistry> registry_ =
      *TableRegistry::New({.store = &store_, .clock = &SystemClock(), .observer = &observer_});
  std::unique_ptr<TableLoader> loader_;
  std::unique_ptr<TableSource> source_;
};

TEST_F(SignedDirectory, ServesASignedTable) {
  Write(first_);
  WriteSignature(first_, alice_);
  Start();
  EXPECT_TRUE(observer_.WaitForVersions({"1"}));
}

TEST_F(SignedDirectory, RefusesAnUnsignedTableUntilItsSignatureComes) {
  Write(first_);
  Start();
  EXPECT_TRUE(store_.Snapshot()->tables.empty());
  EXPECT_TRUE(WasRefusedFor("no signature"));
  WriteSignature(first_, alice_);
  EXPECT_TRUE(observer_.WaitForVersions({"1"}));
}

TEST_F(SignedDirectory, KeepsTheLastGoodTableWhileSignatureAndTableDoNotFit) {
  Write(first_);
  WriteSignature(first_, alice_);
  Start();
  ASSERT_TRUE(observer_.WaitForVersions({"1"}));
  WriteSignature(second_, alice_);
  Write(second_);
  EXPECT_TRUE(observer_.WaitForVersions({"2"}));
  for (const auto& set : observer_.published()) EXPECT_LE(set.size(), 1);
}

TEST_F(SignedDirectory, DoesNotServeWhatSomebodyElseSigned) {
  Write(first_);
  WriteSignature(first_, mallory_);
  Start();
  EXPECT_TRUE(store_.Snapshot()->tables.empty());
  EXPECT_TRUE(WasRefusedFor("somebody else"));
}

}  // namespace
}  // namespace keepset::service
