// The command line of keepsetd: one table of flags, no global registration.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "service/server_config/server_config.h"

namespace keepset::service {
namespace {

using v1::ServerConfig;

struct Flag {
  absl::string_view name;
  absl::string_view value;  // placeholder of the value; empty for a switch
  absl::string_view help;
  std::function<bool(absl::string_view, ServerConfig&)> set;  // false: malformed value
};

std::function<bool(absl::string_view, ServerConfig&)> Number(void (*set)(ServerConfig&, uint32_t)) {
  return [set](absl::string_view text, ServerConfig& config) {
    uint32_t value = 0;
    if (!absl::SimpleAtoi(text, &value)) return false;
    set(config, value);
    return true;
  };
}

std::vector<Flag> Flags() {
  return {
      {"listen", "ADDRESS",
       "unix:/path or host:port; repeatable (default unix:/run/keepset/keepset.sock)",
       [](absl::string_view text, ServerConfig& config) {
         config.add_listen(std::string(text));
         return !text.empty();
       }},
      {"metrics-listen", "HOST:PORT", "Prometheus page; \"off\" disables (default 127.0.0.1:9464)",
       [](absl::string_view text, ServerConfig& config) {
         config.set_metrics_listen(std::string(text));
         return !text.empty();
       }},
      {"health-listen", "HOST:PORT", "grpc.health.v1 alone, for probes (default: none)",
       [](absl::string_view text, ServerConfig& config) {
         config.set_health_listen(std::string(text));
         return !text.empty();
       }},
      {"tables", "DIRECTORY", "table files, watched while serving (default: no tables)",
       [](absl::string_view text, ServerConfig& config) {
         config.set_tables_directory(std::string(text));
         return !text.empty();
       }},
      {"state", "DIRECTORY",
       "keeps uploaded and active tables for the next start (default: in memory only)",
       [](absl::string_view text, ServerConfig& config) {
         config.set_state_directory(std::string(text));
         return !text.empty();
       }},
      {"table-writes", "", "allow Load, Activate, Rollback ... of tables by RPC",
       [](absl::string_view, ServerConfig& config) {
         config.set_table_writes(true);
         return true;
       }},
      {"etcd", "HOST:PORT",
       "tables and decisions of a fleet, watched; repeatable for members of one cluster",
       [](absl::string_view text, ServerConfig& config) {
         config.mutable_etcd()->add_endpoints(std::string(text));
         return !text.empty();
       }},
      {"etcd-prefix", "PREFIX", "of the keys in etcd (default /keepset)",
       [](absl::string_view text, ServerConfig& config) {
         config.mutable_etcd()->set_prefix(std::string(text));
         return !text.empty();
       }},
      {"side-socket", "PATH",
       "descriptor-passing socket (default: first Unix socket with .fd appended)",
       [](absl::string_view text, ServerConfig& config) {
         config.set_side_socket(std::string(text));
         return !text.empty();
       }},
      {"socket-mode", "OCTAL", "mode of the Unix sockets (default 0600)",
       [](absl::string_view text, ServerConfig& config) {
         uint32_t mode = 0;
         for (const char c : text) {
           if (c < '0' || c > '7' || mode > 0777) return false;
           mode = mode * 8 + static_cast<uint32_t>(c - '0');
         }
         config.set_socket_mode(mode);
         return mode > 0;
       }},
      {"threads", "N", "threads of numeric work (default: all cores)",
       Number([](ServerConfig& config, uint32_t value) { config.set_num_threads(value); })},
      {"workers", "N", "operations worked on at the same time (default 2)",
       Number([](ServerConfig& config, uint32_t value) { config.set_num_workers(value); })},
      {"queue", "N", "operations that may wait (default 256)",
       Number([](ServerConfig& config, uint32_t value) {
         config.mutable_limits()->set_queue_capacity(value);
       })},
      {"drain-timeout-ms", "N", "time running operations get at shutdown (default 10000)",
       Number([](ServerConfig& config, uint32_t value) { config.set_drain_timeout_ms(value); })},
      {"lease-seconds", "N", "session lease (default 120)",
       Number([](ServerConfig& config, uint32_t value) {
         config.mutable_memory()->set_lease_seconds(value);
       })},
      {"log-format", "text|json", "form of the log lines (default text)",
       [](absl::string_view text, ServerConfig& config) {
         config.set_log_format(std::string(text));
         return !text.empty();
       }},
      {"allow-insecure-tcp", "", "listen on TCP without TLS",
       [](absl::string_view, ServerConfig& config) {
         config.set_allow_insecure_tcp(true);
         return true;
       }},
      {"allow-posix-shm", "", "accept POSIX shared memory by name",
       [](absl::string_view, ServerConfig& config) {
         config.mutable_memory()->set_allow_posix_shm(true);
         return true;
       }},
      {"shed-to-kept-full", "", "answer kept_full instead of an error when the queue is full",
       [](absl::string_view, ServerConfig& config) {
         config.mutable_limits()->set_shed_to_kept_full(true);
         return true;
       }},
      {"enable-admin", "", "allow Drain by RPC",
       [](absl::string_view, ServerConfig& config) {
         config.set_enable_admin(true);
         return true;
       }},
      {"disable-reflection", "", "no gRPC server reflection",
       [](absl::string_view, ServerConfig& config) {
         config.set_disable_reflection(true);
         return true;
       }},
  };
}

absl::Status Usage(absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat("usage: ", message, "; see keepsetd --help"));
}

// Lists laid over a file replace it; MergeFrom alone would append.
void Overlay(const ServerConfig& flags, ServerConfig& config) {
  if (!flags.listen().empty()) config.clear_listen();
  if (!flags.etcd().endpoints().empty()) config.mutable_etcd()->clear_endpoints();
  config.MergeFrom(flags);
}

}  // namespace

bool IsUsageError(const absl::Status& status) {
  return absl::StartsWith(status.message(), "usage: ");
}

std::string HelpText() {
  std::string text =
      "keepsetd: KV-cache retention as a service.\n\n"
      "  keepsetd --listen unix:/run/keepset/keepset.sock --tables /var/lib/keepset/tables\n"
      "  keepsetd --config /etc/keepset/keepsetd.conf\n\n"
      "Flags win over the file; every field of the file is described in "
      "proto/keepset/v1/server_config.proto.\n\n";
  absl::StrAppendFormat(&text, "  %-32s %s\n", "--config FILE", "configuration as textproto");
  for (const Flag& flag : Flags()) {
    const std::string left =
        absl::StrCat("--", flag.name, flag.value.empty() ? "" : " ", flag.value);
    absl::StrAppendFormat(&text, "  %-32s %s\n", left, std::string(flag.help));
  }
  absl::StrAppend(
      &text, "  --help, --version\n\n",
      "Exit codes: 0 stopped, 2 usage, 3 refused configuration, 5 failed.\n"
      "SIGTERM drains: no new operations, running ones finish. A second one ends at once.\n");
  return text;
}

absl::StatusOr<CommandLine> ParseCommandLine(absl::Span<const char* const> arguments) {
  CommandLine line;
  ServerConfig flags;
  std::string config_path;
  const std::vector<Flag> known = Flags();
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      line.action = CommandLine::Action::kHelp;
      return line;
    }
    if (argument == "--version") {
      line.action = CommandLine::Action::kVersion;
      return line;
    }
    absl::string_view name = argument;
    if (!absl::ConsumePrefix(&name, "--")) {
      return Usage(absl::StrCat("unexpected argument \"", argument, "\""));
    }
    absl::string_view value;
    const size_t equals = name.find('=');
    const bool has_value = equals != absl::string_view::npos;
    if (has_value) {
      value = name.substr(equals + 1);
      name = name.substr(0, equals);
    }
    const Flag* found = nullptr;
    for (const Flag& flag : known) {
      if (flag.name == name) found = &flag;
    }
    const bool is_config = name == "config";
    if (found == nullptr && !is_config) {
      return Usage(absl::StrCat("unknown flag --", name));
    }
    const bool wants_value = is_config || !found->value.empty();
    if (wants_value && !has_value) {
      if (i + 1 == arguments.size()) {
        return Usage(
            absl::StrCat("--", name, " wants a value: ", is_config ? "FILE" : found->value));
      }
      value = arguments[++i];
    } else if (!wants_value && has_value) {
      return Usage(absl::StrCat("--", name, " takes no value"));
    }
    if (is_config) {
      config_path = std::string(value);
    } else if (!found->set(value, flags)) {
      return Usage(absl::StrCat("--", name, "=\"", value, "\", want ", found->value));
    }
  }
  if (!config_path.empty()) {
    KEEPSET_ASSIGN_OR_RETURN(line.config, ReadServerConfig(config_path));
  }
  Overlay(flags, line.config);
  return line;
}

}  // namespace keepset::service
