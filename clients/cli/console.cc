#include "clients/cli/console.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_replace.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {

void PrintError(const absl::Status& status, Console& console) {
  const std::string message =
      absl::StrReplaceAll(status.message(), {{"\r\n", " "}, {"\n", " "}, {"\r", " "}});
  if (console.format == OutputFormat::kJson) {
    const nlohmann::ordered_json error = {{"error",
                                           {{"exit_code", static_cast<int>(ExitCodeOf(status))},
                                            {"code", CodeName(status)},
                                            {"message", message}}}};
    console.err << error.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  } else {
    console.err << "keepset: " << message << "\n";
  }
  console.err.flush();
}

void Progress::Show(absl::string_view text) {
  if (console_.err_kind != StreamKind::kTerminal) return;
  console_.err << "\r\033[K" << text << std::flush;
  shown_ = true;
}

void Progress::Clear() {
  if (!shown_) return;
  console_.err << "\r\033[K" << std::flush;
  shown_ = false;
}

}  // namespace keepset::cli
