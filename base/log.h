// Structured log lines: one line per event on a sink, `key=value` fields, values quoted when
// needed, bytes that are no UTF-8 escaped.
//
//   Logger log(&std::cerr, LogFormat::kText, SystemClock());
//   log.Info("table_published", {{"name", name}, {"digest", digest}});
//
// A Logger is thread-safe (lines never interleave) and is passed in, never global.
#ifndef KEEPSET_BASE_LOG_H_
#define KEEPSET_BASE_LOG_H_

#include <initializer_list>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"

namespace keepset {

enum class LogFormat { kText, kJson };
enum class LogSeverity { kInfo, kWarning, kError };

using LogFields = std::vector<std::pair<std::string, std::string>>;

class Logger {
 public:
  // `sink` must outlive the logger.
  Logger(std::ostream* sink, LogFormat format, const Clock& clock)
      : clock_(clock), format_(format), sink_(sink) {}

  void Info(absl::string_view event, const LogFields& fields = {}) {
    Write(LogSeverity::kInfo, event, fields);
  }
  void Warning(absl::string_view event, const LogFields& fields = {}) {
    Write(LogSeverity::kWarning, event, fields);
  }
  void Error(absl::string_view event, const LogFields& fields = {}) {
    Write(LogSeverity::kError, event, fields);
  }

  void Write(LogSeverity severity, absl::string_view event, const LogFields& fields);

 private:
  const Clock& clock_;
  const LogFormat format_;
  absl::Mutex mutex_;
  std::ostream* const sink_ ABSL_PT_GUARDED_BY(mutex_);
};

}  // namespace keepset

#endif  // KEEPSET_BASE_LOG_H_
