// Where a command's words go. Results go to `out`, messages to `err`; a summary for people is
// printed only where people look, on a terminal.
#ifndef KEEPSET_CLIENTS_CLI_CONSOLE_H_
#define KEEPSET_CLIENTS_CLI_CONSOLE_H_

#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace keepset::cli {

enum class OutputFormat { kText, kJson };
enum class StreamKind { kTerminal, kPipe };
enum class TextColor { kPlain, kColor };

struct Console {
  std::ostream& out;
  std::ostream& err;
  StreamKind out_kind = StreamKind::kPipe;
  StreamKind err_kind = StreamKind::kPipe;
  OutputFormat format = OutputFormat::kText;
  // How `out` may be drawn on: colour by escape codes, and characters in a line.
  TextColor color = TextColor::kPlain;
  int columns = 80;
  std::string program_path = {};  // argv[0] resolved; finds keepsetd beside it

  bool wants_summary() const {
    return format == OutputFormat::kText && out_kind == StreamKind::kTerminal;
  }
};

// One line, or one JSON object on one line.
void PrintError(const absl::Status& status, Console& console);

// A line that replaces itself; nothing in a pipe. Clear() removes it.
class Progress {
 public:
  explicit Progress(Console& console) : console_(console) {}
  ~Progress() { Clear(); }
  void Show(absl::string_view text);
  void Clear();

 private:
  Console& console_;
  bool shown_ = false;
};

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_CONSOLE_H_
