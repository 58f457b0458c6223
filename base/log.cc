#include "base/log.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "base/text.h"

namespace keepset {
namespace {

absl::string_view SeverityName(LogSeverity severity) {
  switch (severity) {
    case LogSeverity::kInfo:
      return "info";
    case LogSeverity::kWarning:
      return "warning";
    case LogSeverity::kError:
      return "error";
  }
  return "unknown";
}

// Control characters are escaped, so that a peer's string cannot forge a second log line.
std::string Quoted(absl::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
          absl::StrAppendFormat(&out, "\\u%04x", static_cast<unsigned char>(c));
        } else {
          out += c;
        }
    }
  }
  out += '"';
  return out;
}

bool NeedsQuotes(absl::string_view text) {
  if (text.empty()) return true;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) <= 0x20 || c == '"' || c == '=' || c == '\\' || c == 0x7f) {
      return true;
    }
  }
  return false;
}

}  // namespace

void Logger::Write(LogSeverity severity, absl::string_view event, const LogFields& fields) {
  const std::string time =
      absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", clock_.Now(), absl::UTCTimeZone());
  std::string line;
  if (format_ == LogFormat::kJson) {
    line =
        absl::StrCat("{\"time\":", Quoted(time), ",\"severity\":", Quoted(SeverityName(severity)),
                     ",\"event\":", Quoted(event));
    for (const auto& [key, value] : fields) {
      absl::StrAppend(&line, ",", Quoted(key), ":", Quoted(ToText(value)));
    }
    line += "}\n";
  } else {
    line = absl::StrCat(time, " ", SeverityName(severity), " ", event);
    for (const auto& [key, value] : fields) {
      const std::string text = ToText(value);
      absl::StrAppend(&line, " ", key, "=", NeedsQuotes(text) ? Quoted(text) : text);
    }
    line += "\n";
  }
  absl::MutexLock lock(&mutex_);
  *sink_ << line;
  sink_->flush();
}

}  // namespace keepset
