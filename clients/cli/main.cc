// keepset: the command line.
#include <signal.h>
#include <unistd.h>

#include <iostream>
#include <string>
#include <vector>

#include "clients/cli/command_list.h"
#include "clients/cli/console.h"

namespace {

keepset::cli::StreamKind KindOf(int fd) {
  return isatty(fd) == 1 ? keepset::cli::StreamKind::kTerminal : keepset::cli::StreamKind::kPipe;
}

std::string OwnPath(const char* fallback) {
  std::vector<char> path(4096);
  const ssize_t length = readlink("/proc/self/exe", path.data(), path.size());
  return length > 0 ? std::string(path.data(), length) : fallback;
}

}  // namespace

int main(int argc, char** argv) {
  // A reader that went away and a file that grew too large are write errors, not a silent death.
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  keepset::cli::Console console{std::cout,
                                std::cerr,
                                KindOf(STDOUT_FILENO),
                                KindOf(STDERR_FILENO),
                                keepset::cli::OutputFormat::kText,
                                OwnPath(argv[0])};
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  return keepset::cli::RunKeepset(arguments, console);
}
