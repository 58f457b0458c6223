#include "service/server_config/server_config.h"

#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace keepset::service {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

v1::ServerConfig Config(absl::string_view text) { return *ParseServerConfig(text, "test"); }

TEST(ParseServerConfig, ReportsFileLineAndColumn) {
  const auto config = ParseServerConfig("num_workers: 2\nwrokers: 3\n", "keepsetd.textproto");
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(config.status().message(), HasSubstr("keepsetd.textproto:2:"));
  EXPECT_THAT(config.status().message(), HasSubstr("wrokers"));
}

TEST(ReadServerConfig, NamesTheMissingFile) {
  const auto config = ReadServerConfig("/nonexistent/keepsetd.textproto");
  EXPECT_EQ(config.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(config.status().message(), HasSubstr("/nonexistent/keepsetd.textproto"));
}

TEST(ReadServerConfig, NamesADirectoryAsSuch) {
  const auto config = ReadServerConfig(::testing::TempDir());
  EXPECT_THAT(config.status().message(),
              AllOf(HasSubstr(::testing::TempDir()), HasSubstr("Is a directory")));
}

TEST(ReadServerConfig, AnEmptyFileMeansTheDefaults) {
  EXPECT_TRUE(ReadServerConfig("/dev/null").ok());
}

TEST(ResolveServerConfig, FillsDefaults) {
  v1::ServerConfig config;
  ASSERT_TRUE(ResolveServerConfig(config).ok());
  EXPECT_EQ(config.listen(0), "unix:/run/keepset/keepset.sock");
  EXPECT_EQ(config.side_socket(), "/run/keepset/keepset.sock.fd");
  EXPECT_EQ(config.socket_mode(), 0600);
  EXPECT_EQ(config.limits().max_inline_bytes(), uint64_t{64} << 20);
  EXPECT_EQ(config.metrics_listen(), "127.0.0.1:9464");
}

TEST(ResolveServerConfig, RefusesWritersThatNobodyCanBe) {
  for (const char* wrong :
       {"table_writers: 'unix:'", "table_writes: true table_writers: 'admin.test'",
        "table_writes: true table_writers: ''"}) {
    v1::ServerConfig config = Config(wrong);
    EXPECT_EQ(ResolveServerConfig(config).code(), absl::StatusCode::kInvalidArgument) << wrong;
  }
  v1::ServerConfig config = Config("table_writes: true table_writers: 'unix:'");
  EXPECT_TRUE(ResolveServerConfig(config).ok());
}

TEST(ResolveServerConfig, RefusesToRequireSignaturesOfNobody) {
  v1::ServerConfig config = Config("require_signature: true");
  const absl::Status refused = ResolveServerConfig(config);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(refused.message(), HasSubstr("trusted_key_files"));
  config.add_trusted_key_files("/etc/keepset/release.pem");
  EXPECT_TRUE(ResolveServerConfig(config).ok());
}

TEST(ResolveServerConfig, RefusesAShareOfShadowsThatIsNone) {
  for (const char* percent : {"-1", "100.5", "nan", "inf"}) {
    v1::ServerConfig config =
        Config(absl::StrCat("shadow { table { alias: 'canary' } percent: ", percent, " }"));
    const absl::Status refused = ResolveServerConfig(config);
    EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument) << percent;
    EXPECT_THAT(refused.message(), HasSubstr("shadow.percent"));
  }
}

TEST(ResolveServerConfig, RefusesAShadowOfNoTable) {
  v1::ServerConfig config = Config("shadow { percent: 5 }");
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("shadow.table"));
  config = Config("shadow { table { alias: 'canary' } percent: 5 }");
  EXPECT_TRUE(ResolveServerConfig(config).ok());
}

TEST(ResolveServerConfig, RefusesPlainTcpUnlessAllowed) {
  v1::ServerConfig config = Config("listen: '127.0.0.1:0'");
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("allow_insecure_tcp"));
  config.set_allow_insecure_tcp(true);
  EXPECT_TRUE(ResolveServerConfig(config).ok());
  EXPECT_EQ(config.side_socket(), "");
}

TEST(ResolveServerConfig, MemoryOfTheServersOwnIsAGibibyteUnlessItIsTurnedOff) {
  v1::ServerConfig config = Config("");
  ASSERT_TRUE(ResolveServerConfig(config).ok());
  EXPECT_EQ(config.memory().max_owned_bytes(), uint64_t{1} << 30);
  EXPECT_EQ(config.memory().max_owned_bytes_per_session(), uint64_t{1} << 28);
  EXPECT_EQ(config.memory().quarantine_seconds(), 60u);
  v1::ServerConfig off = Config("memory { max_owned_bytes: 0 }");
  ASSERT_TRUE(ResolveServerConfig(off).ok());
  EXPECT_EQ(off.memory().max_owned_bytes(), 0u);
}

TEST(ResolveServerConfig, ASessionMayOwnOnePieceOfADeviceAtLeast) {
  v1::ServerConfig config = Config("memory { max_owned_bytes: 4194304 }");
  ASSERT_TRUE(ResolveServerConfig(config).ok());
  EXPECT_EQ(config.memory().max_owned_bytes_per_session(), uint64_t{2} << 20);
}

TEST(ResolveServerConfig, LimitsOfOwnedMemoryThatNothingFitsInAreRefused) {
  const std::pair<const char*, const char*> cases[] = {
      {"max_owned_bytes: 3", "memory.max_owned_bytes=3, want 0 (none) or 2097152 or more"},
      {"max_owned_bytes_per_session: 4096",
       "memory.max_owned_bytes_per_session=4096, want 2097152..1073741824"},
      {"max_owned_bytes: 4194304 max_owned_bytes_per_session: 4194305",
       "memory.max_owned_bytes_per_session=4194305, want 2097152..4194304"}};
  for (const auto& [memory, message] : cases) {
    v1::ServerConfig config = Config(absl::StrCat("memory { ", memory, " }"));
    EXPECT_EQ(ResolveServerConfig(config), absl::InvalidArgumentError(message));
  }
}

TEST(ResolveServerConfig, QuarantineIsAtMostADay) {
  v1::ServerConfig config = Config("memory { quarantine_seconds: 86401 }");
  EXPECT_EQ(ResolveServerConfig(config).message(),
            "memory.quarantine_seconds=86401, want 1..86400");
}

TEST(ResolveServerConfig, NamesFieldValueAndRange) {
  v1::ServerConfig config = Config("memory { lease_seconds: 1 }");
  EXPECT_EQ(ResolveServerConfig(config).message(), "memory.lease_seconds=1, want 3..3600");
}

TEST(ResolveServerConfig, BoundsDeviceMemorySoThatItIsANumberOfBytes) {
  v1::ServerConfig config = Config("device_memory_bytes: 18446744073709551615");
  EXPECT_EQ(ResolveServerConfig(config).message(),
            "device_memory_bytes=18446744073709551615, want 0..1125899906842624");
}

TEST(ResolveServerConfig, BoundsThePromptSoThatSizesStayInsideInt64) {
  v1::ServerConfig config = Config("limits { max_seq_len: 16777217 }");
  EXPECT_EQ(ResolveServerConfig(config).message(), "limits.max_seq_len=16777217, want 1..16777216");
}

TEST(ResolveServerConfig, RefusesHalfATlsConfiguration) {
  v1::ServerConfig config = Config("listen: 'localhost:1' tls { certificate_file: 'a.pem' }");
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("key_file"));
}

TEST(ResolveServerConfig, RefusesUnknownLogFormatAndBadAddresses) {
  v1::ServerConfig config = Config("log_format: 'xml'");
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("want text or json"));
  config = Config("metrics_listen: '127.0.0.1:99999'");
  EXPECT_EQ(ResolveServerConfig(config).message(),
            "metrics_listen: \"127.0.0.1:99999\", want host:port with port 0..65535, or off");
  config = Config("health_listen: 'unix:/run/h.sock'");
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("health_listen"));
  config = Config(absl::StrCat("listen: 'unix:/", std::string(200, 'x'), "'"));
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("want at most 107"));
}

TEST(ParseCommandLine, FlagsWinOverTheFile) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/keepsetd_flags.textproto");
  std::ofstream(path) << "listen: 'unix:/a'\nnum_workers: 7\n";
  const std::string config = absl::StrCat("--config=", path);
  const char* const arguments[] = {config.c_str(), "--listen", "unix:/b", "--threads=3"};
  const auto line = ParseCommandLine(arguments);
  ASSERT_TRUE(line.ok()) << line.status();
  ASSERT_EQ(line->config.listen_size(), 1);
  EXPECT_EQ(line->config.listen(0), "unix:/b");
  EXPECT_EQ(line->config.num_workers(), 7);
  EXPECT_EQ(line->config.num_threads(), 3);
}

TEST(ResolveServerConfig, FillsInAndChecksEtcd) {
  v1::ServerConfig config = Config("etcd { endpoints: 'etcd:2379' }");
  ASSERT_TRUE(ResolveServerConfig(config).ok());
  EXPECT_EQ(config.etcd().prefix(), "/keepset");
  EXPECT_EQ(config.etcd().max_value_bytes(), 1 << 20);
  config = Config("");
  ASSERT_TRUE(ResolveServerConfig(config).ok());
  EXPECT_FALSE(config.has_etcd());
  config = Config("etcd { prefix: '/x' }");
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("etcd.endpoints: none"));
  config = Config("etcd { endpoints: 'etcd:2379' max_value_bytes: 10 }");
  EXPECT_THAT(ResolveServerConfig(config).message(), HasSubstr("etcd.max_value_bytes=10"));
}

TEST(ParseCommandLine, EtcdFlagsReplaceTheFilesEndpoints) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/keepsetd_etcd.textproto");
  std::ofstream(path) << "etcd { endpoints: 'a:1' prefix: '/p' }\n";
  const std::string config = absl::StrCat("--config=", path);
  const char* const arguments[] = {config.c_str(), "--etcd", "b:1", "--etcd=c:1"};
  const auto line = ParseCommandLine(arguments);
  ASSERT_TRUE(line.ok()) << line.status();
  ASSERT_EQ(line->config.etcd().endpoints_size(), 2);
  EXPECT_EQ(line->config.etcd().endpoints(0), "b:1");
  EXPECT_EQ(line->config.etcd().prefix(), "/p");
}

TEST(ParseCommandLine, ReadsOctalModes) {
  const char* const arguments[] = {"--socket-mode", "0660"};
  EXPECT_EQ(ParseCommandLine(arguments)->config.socket_mode(), 0660);
}

struct UsageCase {
  std::vector<const char*> arguments;
  const char* says;
};

class UsageErrors : public ::testing::TestWithParam<UsageCase> {};

TEST_P(UsageErrors, AreNamedAndMarked) {
  const auto line = ParseCommandLine(GetParam().arguments);
  EXPECT_TRUE(IsUsageError(line.status())) << line.status();
  EXPECT_THAT(line.status().message(), HasSubstr(GetParam().says));
}

INSTANTIATE_TEST_SUITE_P(CommandLine, UsageErrors,
                         ::testing::Values(UsageCase{{"--lisen", "x"}, "unknown flag --lisen"},
                                           UsageCase{{"--listen"}, "wants a value: ADDRESS"},
                                           UsageCase{{"--threads", "many"}, "--threads=\"many\""},
                                           UsageCase{{"--socket-mode", "0999"}, "OCTAL"},
                                           UsageCase{{"--enable-admin=1"}, "takes no value"},
                                           UsageCase{{"serve"}, "unexpected argument"}));

TEST(HelpText, ListsEveryFlagOnce) {
  EXPECT_THAT(HelpText(), HasSubstr("--metrics-listen HOST:PORT"));
  EXPECT_THAT(HelpText(), HasSubstr("Exit codes"));
}

}  // namespace
}  // namespace keepset::service
