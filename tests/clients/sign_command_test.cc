#include <filesystem>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/cli_runner.h"
#include "tests/fakes/signing_key.h"

namespace keepset::cli {
namespace {

using ::testing::HasSubstr;

class SignCommand : public CliTest {
 protected:
  SignCommand() {
    std::filesystem::copy_file(Golden("cli_table.safetensors"), Path("t.safetensors"));
    key_ = fakes::NewSigningKey(Path(""), "key");
    other_ = fakes::NewSigningKey(Path(""), "other");
  }
  CliRun Sign() {
    return RunBinary({"tables", "sign", "--key", key_.private_path, Path("t.safetensors")});
  }
  CliRun Validate(const std::string& public_key) {
    return RunBinary({"tables", "validate", "--public-key", public_key, Path("t.safetensors")});
  }

  fakes::SigningKey key_;
  fakes::SigningKey other_;
};

TEST_F(SignCommand, WritesWhatValidateAccepts) {
  const CliRun sign = Sign();
  ASSERT_EQ(sign.exit_code, 0) << sign.err;
  EXPECT_EQ(std::filesystem::file_size(Path("t.safetensors.sig")), 64);
  const CliRun validate = Validate(key_.public_path);
  EXPECT_EQ(validate.exit_code, 0) << validate.err;
  EXPECT_THAT(validate.out, HasSubstr("signed"));
}

TEST_F(SignCommand, ValidateRefusesAnUnsignedTable) {
  const CliRun run = Validate(key_.public_path);
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_THAT(run.err, HasSubstr("t.safetensors.sig"));
}

TEST_F(SignCommand, ValidateRefusesSomebodyElsesSignature) {
  ASSERT_EQ(Sign().exit_code, 0);
  EXPECT_EQ(Validate(other_.public_path).exit_code, 3);
}

TEST_F(SignCommand, ValidateRefusesATableChangedAfterwards) {
  ASSERT_EQ(Sign().exit_code, 0);
  std::filesystem::copy_file(Golden("public_library_table.safetensors"), Path("t.safetensors"),
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_EQ(Validate(key_.public_path).exit_code, 3);
}

TEST_F(SignCommand, AKeyInTheSignaturesPlaceIsUsageAndStays) {
  std::filesystem::copy_file(key_.private_path, Path("t.safetensors.sig"));
  const CliRun run =
      RunBinary({"tables", "sign", "--key", Path("t.safetensors.sig"), Path("t.safetensors")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_THAT(run.err, HasSubstr("is the same file as the key"));
  EXPECT_EQ(std::filesystem::file_size(Path("t.safetensors.sig")),
            std::filesystem::file_size(key_.private_path));
}

TEST_F(SignCommand, WithoutAKeyIsUsage) {
  EXPECT_EQ(RunBinary({"tables", "sign", Path("t.safetensors")}).exit_code, 2);
  EXPECT_EQ(RunBinary({"tables", "sign", "--key", Path("none"), Path("t.safetensors")}).exit_code,
            2);
}

TEST_F(SignCommand, WithAPublicKeyIsRefused) {
  EXPECT_EQ(
      RunBinary({"tables", "sign", "--key", key_.public_path, Path("t.safetensors")}).exit_code, 3);
}

}  // namespace
}  // namespace keepset::cli
