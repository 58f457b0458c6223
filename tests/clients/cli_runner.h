// Runs the `keepset` binary and shows what came out; files go to a directory of the test's own.
#ifndef KEEPSET_TESTS_CLIENTS_CLI_RUNNER_H_
#define KEEPSET_TESTS_CLIENTS_CLI_RUNNER_H_

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace keepset::cli {

struct CliRun {
  int exit_code = -1;
  std::string out;
  std::string err;
};

CliRun RunBinary(const std::vector<std::string>& arguments);

class CliTest : public ::testing::Test {
 protected:
  CliTest();
  ~CliTest() override;

  std::string Path(const std::string& name) const { return directory_ + "/" + name; }
  static std::string Golden(const std::string& name);
  // Files of the test's directory.
  std::vector<std::string> Files() const;
  // "compress CAPTURE --out RESULT" and `more`.
  CliRun Compress(const std::vector<std::string>& more) const;

 private:
  std::string directory_;
};

// Exactly one line, ended by a newline.
bool IsOneLine(const std::string& text);

}  // namespace keepset::cli

#endif  // KEEPSET_TESTS_CLIENTS_CLI_RUNNER_H_
