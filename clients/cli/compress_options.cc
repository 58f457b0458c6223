#include "clients/cli/compress_options.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/registry_text.h"
#include "clients/cpp/table_client.h"

namespace keepset::cli {
namespace {

constexpr const char* kSynopsis =
    "compress CAPTURE --policy NAME [--param K=V]... [--table FILE]\n"
    "         [--budget N | --kept-fraction F | --budget-bytes N] [--scope S] [--protect-...]\n"
    "         [--server ADDR [--transport T]] [--gather] --out RESULT";
constexpr const char* kSummary =
    "Decides which positions of a captured prompt to keep, and writes them to RESULT. Without\n"
    "--server the work is done in this process; a server gives the same answer.";

// What the parser fills before it is checked.
struct RawOptions {
  CompressOptions options;
  std::optional<std::string> policy;
  std::optional<std::string> out;
  std::optional<std::string> transport;
  std::optional<std::string> table_name;
  std::optional<std::string> table_version;
  std::optional<std::string> table_digest;
  std::optional<std::string> shadow_table;
  std::optional<int64_t> protect_sink;
  std::optional<int64_t> protect_window;
  std::optional<int64_t> threads;
  std::vector<std::string> parameters;
};

FlagParser MakeParser(RawOptions& raw) {
  FlagParser parser("compress", kSynopsis, kSummary);
  CompressOptions& options = raw.options;
  parser
      .Text("--policy", "NAME",
            "compilerkv, observation_heads, snapkv, streaming_llm, tova, knorm, random, full",
            &raw.policy)
      .List("--param", "K=V", "a parameter of the policy; may be repeated", &raw.parameters)
      .Text("--table", "FILE", "decision table; with --server: its digest must be active there",
            &options.table)
      .Int("--budget", "N", "positions to keep per layer", &options.budget)
      .Real("--kept-fraction", "F", "share of the positions to keep", &options.kept_fraction)
      .Int("--budget-bytes", "N", "bytes to keep per layer", &options.budget_bytes)
      .Text("--scope", "S", "layer_elastic, layer_equal, sequence or kv_head", &options.scope)
      .Int("--protect-sink", "N", "always keep the first N positions", &raw.protect_sink)
      .Int("--protect-window", "N", "always keep the last N positions", &raw.protect_window)
      .List("--protect-span", "NAME", "always keep a span of the capture; may be repeated",
            &options.protect_spans)
      .Text("--observe-span", "NAME", "observation_heads: rows of this span of the capture observe",
            &options.observe_span)
      .Real("--ppl", "X", "perplexity of the prompt's end; wins over the capture's", &options.ppl)
      .Switch("--shadow", "decide and report only", &options.shadow);
  AddServerFlags(parser, &options.server)
      .Text("--transport", "T", "auto, memfd or inline", &raw.transport)
      .Text("--table-name", "NAME", "with --server: the table must have this name", &raw.table_name)
      .Text("--table-version", "V", "with --server: ... this version", &raw.table_version)
      .Text("--table-digest", "D", "with --server: ... this digest (sha256:HEX)", &raw.table_digest)
      .Text("--shadow-table", "TABLE",
            "with --server: also ask NAME, NAME@VERSION, NAME@sha256:HEX or NAME:ALIAS, and say "
            "how far it agrees",
            &raw.shadow_table)
      .Switch("--gather", "write the kept rows of K and V as well", &options.gather)
      .Int("--threads", "N", "CPU threads of work in this process (0: all cores)", &raw.threads)
      .Switch("--json", "print the result, or the error, as JSON", &options.json)
      .Text("--out", "RESULT", "result file", &raw.out)
      .Alias("-o", "--out");
  return parser;
}

absl::Status CheckServerFlags(const RawOptions& raw) {
  KEEPSET_RETURN_IF_ERROR(raw.options.server.Check());
  if (raw.options.server.address.has_value()) {
    if (raw.threads.has_value()) {
      return UsageError("--threads is for work in this process, remove it or --server");
    }
    return absl::OkStatus();
  }
  const std::pair<const char*, bool> server_flags[] = {
      {"--transport", raw.transport.has_value()},
      {"--table-name", raw.table_name.has_value()},
      {"--table-version", raw.table_version.has_value()},
      {"--table-digest", raw.table_digest.has_value()},
      {"--shadow-table", raw.shadow_table.has_value()},
  };
  for (const auto& [flag, given] : server_flags) {
    if (given) return UsageError(absl::StrCat(flag, " needs --server"));
  }
  return absl::OkStatus();
}

absl::Status SplitParameters(const RawOptions& raw, CompressOptions& options) {
  for (const std::string& text : raw.parameters) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) {
      return UsageError(absl::StrCat("--param ", text, ", want NAME=VALUE"));
    }
    const std::string name = text.substr(0, equals);
    for (const auto& [known, value] : options.parameters) {
      if (known == name) return UsageError(absl::StrCat("--param ", name, " is given twice"));
    }
    options.parameters.emplace_back(name, text.substr(equals + 1));
  }
  return absl::OkStatus();
}

}  // namespace

std::string CompressHelp() {
  RawOptions raw;
  return MakeParser(raw).Help();
}

absl::StatusOr<CompressOptions> ParseCompressOptions(absl::Span<const std::string> arguments) {
  RawOptions raw;
  CompressOptions& options = raw.options;
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> captures,
                           MakeParser(raw).Parse(arguments, 1, 1));
  options.capture = captures[0];
  if (!raw.policy.has_value()) {
    return UsageError("--policy is missing, want a policy's name (keepset compress --help)");
  }
  options.policy = *raw.policy;
  if (!raw.out.has_value()) return UsageError("--out is missing, want --out RESULT");
  options.out = *raw.out;
  const int budgets = static_cast<int>(options.budget.has_value()) +
                      static_cast<int>(options.kept_fraction.has_value()) +
                      static_cast<int>(options.budget_bytes.has_value());
  if (budgets > 1) {
    return UsageError("--budget, --kept-fraction and --budget-bytes exclude each other");
  }
  if (options.gather && options.shadow) {
    return UsageError("--gather and --shadow exclude each other: shadow moves nothing");
  }
  if (options.scope.has_value() && !client::ParseScope(*options.scope).has_value()) {
    return UsageError(absl::StrCat("unknown scope --scope=", *options.scope,
                                   ", want layer_elastic, layer_equal, sequence or kv_head"));
  }
  KEEPSET_RETURN_IF_ERROR(CheckServerFlags(raw));
  KEEPSET_RETURN_IF_ERROR(SplitParameters(raw, options));
  if (raw.transport.has_value()) {
    bool known = false;
    for (client::Transport transport :
         {client::Transport::kAuto, client::Transport::kMemfd, client::Transport::kInline}) {
      if (client::TransportName(transport) != *raw.transport) continue;
      options.transport = transport;
      known = true;
    }
    if (!known) {
      return UsageError(
          absl::StrCat("--transport=", *raw.transport, ", want auto, memfd or inline"));
    }
  }
  options.pin = {raw.table_name.value_or(""), raw.table_version.value_or(""),
                 raw.table_digest.value_or(""), ""};
  if (raw.shadow_table.has_value()) {
    KEEPSET_ASSIGN_OR_RETURN(const client::TableRef ref, ParseTableRef(*raw.shadow_table));
    options.shadow_table = client::TablePin{ref.name, ref.version, ref.digest, ref.alias};
  }
  if (options.table.has_value() && !options.pin.digest.empty()) {
    return UsageError("--table and --table-digest exclude each other: the file pins its digest");
  }
  options.protect_sink = raw.protect_sink.value_or(0);
  options.protect_window = raw.protect_window.value_or(0);
  options.threads = raw.threads.value_or(0);
  return options;
}

}  // namespace keepset::cli
