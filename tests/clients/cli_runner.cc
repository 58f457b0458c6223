#include "tests/clients/cli_runner.h"

#include <fcntl.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace keepset::cli {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

std::string NewDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "cli-test-XXXXXX").string();
  return mkdtemp(name.data());
}

}  // namespace

CliRun RunBinary(const std::vector<std::string>& arguments) {
  const std::string directory = NewDirectory();
  const std::string out = directory + "/out";
  const std::string err = directory + "/err";
  std::vector<std::string> words = {KEEPSET_BINARY};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(), O_WRONLY | O_CREAT, 0600);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), O_WRONLY | O_CREAT, 0600);
  pid_t pid = -1;
  CliRun run;
  if (posix_spawn(&pid, KEEPSET_BINARY, &actions, nullptr, argv.data(), environ) == 0) {
    int status = 0;
    if (waitpid(pid, &status, 0) == pid && WIFEXITED(status)) run.exit_code = WEXITSTATUS(status);
  }
  posix_spawn_file_actions_destroy(&actions);
  run.out = ReadAll(out);
  run.err = ReadAll(err);
  std::filesystem::remove_all(directory);
  return run;
}

CliTest::CliTest() : directory_(NewDirectory()) {}

CliTest::~CliTest() { std::filesystem::remove_all(directory_); }

std::string CliTest::Golden(const std::string& name) {
  return std::string(KEEPSET_SOURCE_DIR) + "/tests/golden/" + name;
}

std::vector<std::string> CliTest::Files() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

CliRun CliTest::Compress(const std::vector<std::string>& more) const {
  std::vector<std::string> arguments = {"compress", Golden("cli_capture.safetensors"), "--out",
                                        Path("result")};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return RunBinary(arguments);
}

bool IsOneLine(const std::string& text) {
  return !text.empty() && text.back() == '\n' && std::count(text.begin(), text.end(), '\n') == 1;
}

}  // namespace keepset::cli
