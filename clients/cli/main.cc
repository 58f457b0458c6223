// keepset: the command line.
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "base/malloc_options.h"
#include "clients/cli/command_list.h"
#include "clients/cli/console.h"

namespace {

keepset::cli::StreamKind KindOf(int fd) {
  return isatty(fd) == 1 ? keepset::cli::StreamKind::kTerminal : keepset::cli::StreamKind::kPipe;
}

// no-color.org: NO_COLOR with any value but the empty one turns colour off.
keepset::cli::TextColor ColorOf(int fd) {
  const char* no_color = getenv("NO_COLOR");
  const char* terminal = getenv("TERM");
  const bool wanted = (no_color == nullptr || *no_color == '\0') && terminal != nullptr &&
                      strcmp(terminal, "dumb") != 0;
  return wanted && isatty(fd) == 1 ? keepset::cli::TextColor::kColor
                                   : keepset::cli::TextColor::kPlain;
}

int ColumnsOf(int fd) {
  constexpr int kUnknown = 80;
  winsize size = {};
  return ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kUnknown;
}

std::string OwnPath(const char* fallback) {
  std::vector<char> path(4096);
  const ssize_t length = readlink("/proc/self/exe", path.data(), path.size());
  return length > 0 ? std::string(path.data(), length) : fallback;
}

}  // namespace

int main(int argc, char** argv) {
  keepset::KeepFreedMemory();
  // A reader that went away and a file that grew too large are write errors, not a silent death.
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  keepset::cli::Console console{std::cout,
                                std::cerr,
                                KindOf(STDOUT_FILENO),
                                KindOf(STDERR_FILENO),
                                keepset::cli::OutputFormat::kText,
                                ColorOf(STDOUT_FILENO),
                                ColumnsOf(STDOUT_FILENO),
                                OwnPath(argv[0])};
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  return keepset::cli::RunKeepset(arguments, console);
}
