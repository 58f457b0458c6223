#include "base/log.h"

#include <sstream>

#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace keepset {
namespace {

class FixedClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::FromUnixMillis(1'700'000'000'123); }
  absl::Duration Monotonic() const override { return absl::ZeroDuration(); }
};

TEST(Logger, WritesOneTextLineWithQuotedFields) {
  FixedClock clock;
  std::ostringstream sink;
  Logger log(&sink, LogFormat::kText, clock);
  log.Info("table_published", {{"name", "a b"}, {"layers", "32"}});
  EXPECT_EQ(sink.str(), "2023-11-14T22:13:20.123Z info table_published name=\"a b\" layers=32\n");
}

TEST(Logger, EscapesControlCharactersSoThatNoLineCanBeForged) {
  FixedClock clock;
  std::ostringstream sink;
  Logger log(&sink, LogFormat::kText, clock);
  log.Warning("peer", {{"engine", "x\nerror forged"}});
  EXPECT_EQ(sink.str().find('\n'), sink.str().size() - 1);
}

TEST(Logger, WritesJson) {
  FixedClock clock;
  std::ostringstream sink;
  Logger log(&sink, LogFormat::kJson, clock);
  log.Error("e", {{"k", "v\"w"}});
  EXPECT_EQ(sink.str(),
            "{\"time\":\"2023-11-14T22:13:20.123Z\",\"severity\":\"error\",\"event\":\"e\","
            "\"k\":\"v\\\"w\"}\n");
}

TEST(Logger, WritesBytesThatAreNoTextAsText) {
  FixedClock clock;
  for (const LogFormat format : {LogFormat::kText, LogFormat::kJson}) {
    std::ostringstream sink;
    Logger log(&sink, format, clock);
    log.Info("e", {{"file", "x\xff é"}});
    EXPECT_NE(sink.str().find("\"x\\\\xff é\""), std::string::npos) << sink.str();
  }
}

}  // namespace
}  // namespace keepset
