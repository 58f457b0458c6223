// A program of the build tree as a child of the test: started, read line by line, signalled,
// reaped.
#ifndef KEEPSET_TESTS_INTEGRATION_CHILD_PROCESS_H_
#define KEEPSET_TESTS_INTEGRATION_CHILD_PROCESS_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "service/memory/memory_transport.h"

namespace keepset::integration {

class ChildProcess {
 public:
  enum class Output { kStdout, kStderr };

  // Starts `arguments[0]` and reads `output` of it; the other one is the test's own. `environment`:
  // "NAME=value" beside the test's own.
  ChildProcess(const std::vector<std::string>& arguments, Output output,
               const std::vector<std::string>& environment = {});
  // Kills what still runs.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  // The next line that holds `part`, lines before it are dropped; empty when the child ends or says
  // nothing of the kind before the deadline of tests.
  std::string AwaitLine(const std::string& part);
  void Signal(int number);
  // SIGSTOP; returns when every thread stands.
  void Freeze();
  bool HasEnded();
  // The status of waitpid; -1 when it does not end before the deadline of tests.
  int Wait();
  // SIGKILL and Wait.
  void Kill();

 private:
  pid_t pid_ = -1;
  int status_ = -1;
  service::UniqueFd output_;
  std::string unread_;
};

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_CHILD_PROCESS_H_
