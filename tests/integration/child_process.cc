#include "tests/integration/child_process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/integration/eventually.h"

extern char** environ;

namespace keepset::integration {
namespace {

// As shells end where a program cannot be run.
constexpr int kCannotExecute = 127;

}  // namespace

ChildProcess::ChildProcess(const std::vector<std::string>& arguments, Output output,
                           const std::vector<std::string>& environment) {
  int ends[2] = {-1, -1};
  EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  output_.Reset(ends[0]);
  const service::UniqueFd write_end(ends[1]);
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  std::vector<char*> envp;
  for (const std::string& entry : environment) envp.push_back(const_cast<char*>(entry.c_str()));
  for (char** entry = environ; *entry != nullptr; ++entry) envp.push_back(*entry);
  envp.push_back(nullptr);
  const pid_t test = ::getpid();
  const int stream = output == Output::kStdout ? STDOUT_FILENO : STDERR_FILENO;
  pid_ = ::fork();
  EXPECT_GE(pid_, 0) << argv[0];
  if (pid_ != 0) return;
  // The tests have threads: only calls that are safe in a signal handler from here on. A test that
  // crashes takes its children along, which would hold the runner's pipe.
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && ::getppid() == test &&
      ::dup2(write_end.get(), stream) == stream) {
    ::execvpe(argv[0], argv.data(), envp.data());
  }
  ::_exit(kCannotExecute);
}

ChildProcess::~ChildProcess() { Kill(); }

std::string ChildProcess::AwaitLine(const std::string& part) {
  const absl::Duration end = SystemClock().Monotonic() + TestDeadline();
  while (true) {
    for (size_t newline = unread_.find('\n'); newline != std::string::npos;
         newline = unread_.find('\n')) {
      const std::string line = unread_.substr(0, newline);
      unread_.erase(0, newline + 1);
      if (line.find(part) != std::string::npos) return line;
    }
    const absl::Duration left = end - SystemClock().Monotonic();
    pollfd polled = {output_.get(), POLLIN, 0};
    if (left <= absl::ZeroDuration() ||
        ::poll(&polled, 1, static_cast<int>(absl::ToInt64Milliseconds(left)) + 1) <= 0) {
      return "";
    }
    char bytes[4096];
    const ssize_t size = ::read(output_.get(), bytes, sizeof(bytes));
    if (size <= 0) return "";
    unread_.append(bytes, static_cast<size_t>(size));
  }
}

void ChildProcess::Signal(int number) {
  if (pid_ > 0) ::kill(pid_, number);
}

void ChildProcess::Freeze() {
  Signal(SIGSTOP);
  int status = 0;
  EXPECT_EQ(::waitpid(pid_, &status, WUNTRACED), pid_);
  EXPECT_TRUE(WIFSTOPPED(status));
}

bool ChildProcess::HasEnded() {
  if (pid_ > 0 && ::waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = -1;
  return pid_ < 0;
}

int ChildProcess::Wait() {
  return Eventually([this] { return HasEnded(); }) ? status_ : -1;
}

void ChildProcess::Kill() {
  Signal(SIGKILL);
  Wait();
}

}  // namespace keepset::integration
