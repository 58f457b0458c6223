#include "tables/table_signature.h"

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/signing_key.h"
#include "tests/fakes/table_files.h"

namespace keepset::tables {
namespace {

using ::testing::HasSubstr;

absl::Span<const std::byte> AsBytes(const std::string& text) {
  return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()), text.size());
}

std::string Pem(absl::string_view type, absl::string_view der_hex) {
  return absl::StrCat("-----BEGIN ", type, " KEY-----\n",
                      absl::Base64Escape(absl::HexStringToBytes(der_hex)), "\n-----END ", type,
                      " KEY-----\n");
}

void WriteFile(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

class Signature : public ::testing::Test {
 protected:
  TrustedKeys Trust(const std::vector<fakes::SigningKey>& keys) {
    std::vector<std::string> paths;
    for (const fakes::SigningKey& key : keys) paths.push_back(key.public_path);
    absl::StatusOr<TrustedKeys> trusted = TrustedKeys::Read(paths);
    EXPECT_TRUE(trusted.ok()) << trusted.status();
    return trusted.ok() ? *trusted : TrustedKeys();
  }
  std::string Sign(const std::string& text, const fakes::SigningKey& by) {
    absl::StatusOr<std::string> signature = SignBytes(AsBytes(text), by.private_path);
    EXPECT_TRUE(signature.ok()) << signature.status();
    return signature.value_or("");
  }

  fakes::ScratchDirectory directory_;
  const fakes::SigningKey alice_ = fakes::NewSigningKey(directory_.path(), "alice");
  const fakes::SigningKey bob_ = fakes::NewSigningKey(directory_.path(), "bob");
  const std::string text_ = "the bytes of a table";
};

// RFC 8032, 7.1, test 2.
TEST_F(Signature, IsThatOfRfc8032) {
  const std::string key = directory_ / "rfc.key";
  WriteFile(key, Pem("PRIVATE",
                     "302e020100300506032b657004220420"
                     "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"));
  const auto trusted =
      TrustedKeys::Parse(Pem("PUBLIC",
                             "302a300506032b6570032100"
                             "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"),
                         "rfc");
  ASSERT_TRUE(trusted.ok()) << trusted.status();
  const std::string message = "\x72";
  const auto signature = SignBytes(AsBytes(message), key);
  ASSERT_TRUE(signature.ok()) << signature.status();
  EXPECT_EQ(absl::BytesToHexString(*signature),
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00");
  EXPECT_TRUE(trusted->Verify(AsBytes(message), *signature, "message").ok());
}

TEST_F(Signature, OfAnyTrustedKeyCounts) {
  const TrustedKeys trusted = Trust({alice_, bob_});
  EXPECT_TRUE(trusted.Verify(AsBytes(text_), Sign(text_, bob_), "t").ok());
  EXPECT_TRUE(trusted.Verify(AsBytes(text_), Sign(text_, alice_), "t").ok());
}

TEST_F(Signature, OfSomebodyElseIsRefused) {
  const absl::Status refused = Trust({alice_}).Verify(AsBytes(text_), Sign(text_, bob_), "table x");
  EXPECT_EQ(refused.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("table x"));
}

TEST_F(Signature, OfNobodyTrustedIsRefused) {
  EXPECT_EQ(TrustedKeys().Verify(AsBytes(text_), Sign(text_, alice_), "t").code(),
            absl::StatusCode::kPermissionDenied);
}

TEST_F(Signature, NoticesEveryChangedByte) {
  const TrustedKeys trusted = Trust({alice_});
  const std::string signature = Sign(text_, alice_);
  for (size_t i = 0; i < text_.size(); ++i) {
    std::string tampered = text_;
    tampered[i] ^= 1;
    EXPECT_EQ(trusted.Verify(AsBytes(tampered), signature, "t").code(),
              absl::StatusCode::kPermissionDenied)
        << i;
  }
  for (size_t i = 0; i < signature.size(); ++i) {
    std::string tampered = signature;
    tampered[i] ^= 1;
    EXPECT_EQ(trusted.Verify(AsBytes(text_), tampered, "t").code(),
              absl::StatusCode::kPermissionDenied)
        << i;
  }
}

TEST_F(Signature, MayBeBase64) {
  const TrustedKeys trusted = Trust({alice_});
  const std::string base64 = absl::Base64Escape(Sign(text_, alice_));
  EXPECT_TRUE(trusted.Verify(AsBytes(text_), base64, "t").ok());
  EXPECT_TRUE(trusted.Verify(AsBytes(text_), base64 + "\n", "t").ok());
}

TEST_F(Signature, OfAnotherFormIsInvalid) {
  const TrustedKeys trusted = Trust({alice_});
  const std::string signature = Sign(text_, alice_);
  for (const std::string& bad :
       {std::string(), signature.substr(1), signature + "x", absl::BytesToHexString(signature),
        absl::Base64Escape(signature.substr(1)), std::string(1 << 20, 'A')}) {
    EXPECT_EQ(trusted.Verify(AsBytes(text_), bad, "t").code(), absl::StatusCode::kInvalidArgument)
        << bad.size();
  }
}

TEST_F(Signature, KeysMayShareAFile) {
  const auto both = TrustedKeys::Parse(alice_.public_pem + "\n" + bob_.public_pem, "both");
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_TRUE(both->Verify(AsBytes(text_), Sign(text_, bob_), "t").ok());
}

TEST_F(Signature, KeyFilesHoldPublicKeysAndNothingElse) {
  const auto expect_invalid = [](const std::string& pem) {
    EXPECT_EQ(TrustedKeys::Parse(pem, "keys").status().code(), absl::StatusCode::kInvalidArgument)
        << pem;
  };
  expect_invalid("");
  expect_invalid("not a key");
  expect_invalid(ReadFile(alice_.private_path));
  expect_invalid(fakes::NewForeignKey(directory_.path(), "foreign").public_pem);
  std::string damaged = alice_.public_pem;
  damaged[damaged.find('\n') + 10] = '!';
  expect_invalid(damaged);
  expect_invalid(alice_.public_pem + damaged);
}

TEST_F(Signature, KeyFilesThatAreMissingAreNamed) {
  const std::string path = directory_ / "nobody.pem";
  const std::vector<std::string> paths = {alice_.public_path, path};
  const absl::Status missing = TrustedKeys::Read(paths).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr(path));
}

TEST_F(Signature, SigningWantsAPrivateEd25519Key) {
  const fakes::SigningKey foreign = fakes::NewForeignKey(directory_.path(), "foreign");
  for (const std::string& key : {foreign.private_path, alice_.public_path}) {
    EXPECT_EQ(SignBytes(AsBytes(text_), key).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(SignBytes(AsBytes(text_), directory_ / "nobody.key").status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(Signature, OfATableFileLiesBesideIt) {
  const std::string table = directory_ / "a.safetensors";
  WriteFile(table, fakes::TableBytes("a", "1"));
  EXPECT_EQ(VerifyTableFile(table, Trust({alice_})).code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(SignTableFile(table, alice_.private_path).ok());
  EXPECT_EQ(ReadFile(table + ".sig").size(), 64);
  EXPECT_TRUE(VerifyTableFile(table, Trust({alice_})).ok());
  WriteFile(table, fakes::TableBytes("a", "2"));
  EXPECT_EQ(VerifyTableFile(table, Trust({alice_})).code(), absl::StatusCode::kPermissionDenied);
}

TEST_F(Signature, OfWhatIsNoTableIsNotMade) {
  const std::string path = directory_ / "a.safetensors";
  WriteFile(path, "no table");
  EXPECT_EQ(SignTableFile(path, alice_.private_path).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(std::ifstream(path + ".sig").is_open());
}

}  // namespace
}  // namespace keepset::tables
