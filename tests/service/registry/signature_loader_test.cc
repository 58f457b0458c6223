#include "service/registry/signature_loader.h"

#include <memory>
#include <string>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tables/table_file.h"
#include "tests/fakes/signing_key.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;

absl::Span<const std::byte> AsBytes(const std::string& text) {
  return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()), text.size());
}

class ParsingLoader final : public TableLoader {
 public:
  absl::StatusOr<TablePtr> LoadTable(TableCandidate candidate) override {
    return tables::ParseTable(AsBytes(candidate.bytes), candidate.label);
  }
};

class SignedTables : public ::testing::Test {
 protected:
  std::unique_ptr<TableLoader> NewLoader(SignatureRule rule) {
    auto keys = tables::TrustedKeys::Parse(alice_.public_pem, "alice");
    EXPECT_TRUE(keys.ok()) << keys.status();
    return NewSignatureLoader(std::make_unique<ParsingLoader>(), *std::move(keys), rule);
  }
  std::string Sign(const std::string& bytes, const fakes::SigningKey& by) {
    return tables::SignBytes(AsBytes(bytes), by.private_path).value_or("");
  }

  fakes::ScratchDirectory directory_;
  const fakes::SigningKey alice_ = fakes::NewSigningKey(directory_.path(), "alice");
  const fakes::SigningKey mallory_ = fakes::NewSigningKey(directory_.path(), "mallory");
  const std::string table_ = fakes::TableBytes("a", "1");
};

TEST_F(SignedTables, PassUnderEitherRule) {
  for (SignatureRule rule : {SignatureRule::kWhereSigned, SignatureRule::kRequired}) {
    const auto table = NewLoader(rule)->LoadTable({table_, "a", Sign(table_, alice_)});
    ASSERT_TRUE(table.ok()) << table.status();
    EXPECT_EQ((*table)->identity().version, "1");
  }
}

TEST_F(SignedTables, UnsignedOnesPassOnlyWhereNoSignatureIsRequired) {
  EXPECT_TRUE(NewLoader(SignatureRule::kWhereSigned)->LoadTable({table_, "a", ""}).ok());
  const absl::Status refused =
      NewLoader(SignatureRule::kRequired)->LoadTable({table_, "file a", ""}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("file a"));
}

TEST_F(SignedTables, WrongSignaturesNeverPass) {
  for (SignatureRule rule : {SignatureRule::kWhereSigned, SignatureRule::kRequired}) {
    EXPECT_EQ(NewLoader(rule)->LoadTable({table_, "a", Sign(table_, mallory_)}).status().code(),
              absl::StatusCode::kPermissionDenied);
    EXPECT_EQ(NewLoader(rule)
                  ->LoadTable({fakes::TableBytes("a", "2"), "a", Sign(table_, alice_)})
                  .status()
                  .code(),
              absl::StatusCode::kPermissionDenied);
  }
}

TEST_F(SignedTables, DamagedOnesAreStillRefusedForTheirDamage) {
  const std::string damaged = "no table";
  EXPECT_EQ(NewLoader(SignatureRule::kRequired)
                ->LoadTable({damaged, "a", Sign(damaged, alice_)})
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(SignedTables, WithoutKeysOnlyARequiredSignatureIsRefused) {
  const std::string signature = Sign(table_, alice_);
  EXPECT_TRUE(
      CheckSignature(AsBytes(table_), signature, "a", {}, SignatureRule::kWhereSigned).ok());
  EXPECT_EQ(CheckSignature(AsBytes(table_), signature, "a", {}, SignatureRule::kRequired).code(),
            absl::StatusCode::kPermissionDenied);
}

}  // namespace
}  // namespace keepset::service
