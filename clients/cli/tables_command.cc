// keepset tables: inspect | validate | sign | diff | records | compile | import | uniform.
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "clients/cli/command_list.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/inspect_command.h"
#include "clients/cli/model_source.h"
#include "clients/cli/new_table.h"

namespace keepset::cli {
namespace {

using Arguments = absl::Span<const std::string>;
using Json = nlohmann::ordered_json;

constexpr double kNeutralHeadWeight = 1.0;
constexpr double kMostPermissiveGate = 0.8;
constexpr int kManyFiles = 1 << 20;

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Whatever is wrong with a signature, the table is refused.
absl::Status VerifySignature(const std::string& file, const std::string& public_key) {
  return WithExitCode(FromEngine(keepset_table_verify(file.c_str(), public_key.c_str())),
                      ExitCode::kRefused);
}

absl::Status Validate(Arguments arguments, Console& console) {
  bool json = false;
  std::optional<std::string> public_key;
  FlagParser parser("tables validate", "tables validate FILE... [--public-key FILE] [--json]",
                    "Reads every file completely; one line per good file, exit code 3 when one is "
                    "refused.");
  parser
      .Text("--public-key", "FILE", "Ed25519 keys, PEM; FILE.sig must be by one of them",
            &public_key)
      .Switch("--json", "one JSON object per file", &json);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> files,
                           parser.Parse(arguments, 1, kManyFiles));
  if (public_key.has_value()) KEEPSET_RETURN_IF_ERROR(CheckFileExists("public key", *public_key));
  absl::Status last = absl::OkStatus();
  for (const std::string& file : files) {
    absl::StatusOr<TableHandle> table = LoadTable(file);
    if (table.ok() && public_key.has_value()) {
      const absl::Status verified = VerifySignature(file, *public_key);
      if (!verified.ok()) table = verified;
    }
    if (!table.ok()) {
      // Every refused file is reported; the last one by whoever prints the command's status.
      if (!last.ok()) PrintError(last, console);
      last = table.status();
      continue;
    }
    const keepset_table* loaded = table->get();
    if (json) {
      console.out << Dump({{"file", file},
                           {"valid", true},
                           {"signed", public_key.has_value()},
                           {"kind", keepset_table_kind(loaded)},
                           {"name", keepset_table_name(loaded)},
                           {"version", keepset_table_version(loaded)},
                           {"digest", keepset_table_digest(loaded)}})
                  << "\n";
    } else {
      console.out << file << ": valid, " << (public_key.has_value() ? "signed, " : "")
                  << keepset_table_kind(loaded) << " " << keepset_table_name(loaded) << " "
                  << keepset_table_version(loaded) << " " << keepset_table_digest(loaded) << "\n";
    }
  }
  return last;
}

absl::StatusOr<std::vector<int64_t>> ParseBudgets(const std::optional<std::string>& text) {
  std::vector<int64_t> budgets;
  if (!text.has_value()) return budgets;
  for (absl::string_view part : absl::StrSplit(*text, ',')) {
    int64_t budget;
    if (!absl::SimpleAtoi(part, &budget)) {
      return UsageError(absl::StrCat("--budgets=", *text, ", want integers such as 256,512"));
    }
    if (budget < 1) return RefusedError(absl::StrCat("--budgets: ", budget, ", want 1 or more"));
    budgets.push_back(budget);
  }
  return budgets;
}

absl::Status Uniform(Arguments arguments, Console& console) {
  NewTableFlags flags;
  std::optional<double> head_weight;
  std::optional<double> gate;
  std::optional<std::string> budgets_text;
  FlagParser parser("tables uniform",
                    "tables uniform (--model-json FILE | --like FILE) --name NAME --version V "
                    "--out FILE",
                    "A neutral table: one head weight and one gate everywhere, named so in its "
                    "provenance.");
  flags.AddTo(parser);
  parser.Real("--head-weight", "X", "0.8..1.5, default 1", &head_weight)
      .Real("--gate", "X", "0.8..1.0, default 0.8", &gate)
      .Text("--budgets", "N,N...", "budgets it serves, default any", &budgets_text);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_RETURN_IF_ERROR(parser.Parse(arguments, 0, 0).status());
  KEEPSET_RETURN_IF_ERROR(flags.Check({}));
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<int64_t> budgets, ParseBudgets(budgets_text));
  KEEPSET_ASSIGN_OR_RETURN(const std::string model, ReadModelJson(flags.model));
  KEEPSET_RETURN_IF_ERROR(WriteStatus(FromEngine(keepset_table_write_uniform(
      flags.out->c_str(), flags.name->c_str(), flags.version->c_str(), model.c_str(),
      static_cast<float>(head_weight.value_or(kNeutralHeadWeight)),
      static_cast<float>(gate.value_or(kMostPermissiveGate)),
      budgets.empty() ? nullptr : budgets.data(), budgets.size()))));
  return flags.Report(console);
}

// The files of a reference directory. Arrays that a damaged manifest does not name are none; the
// import refuses it.
std::vector<InputFile> ReferenceFiles(const std::string& directory) {
  std::vector<InputFile> files = {{"manifest", directory + "/manifest.json"}};
  std::ifstream stream(files[0].path, std::ios::binary);
  const Json manifest = Json::parse(stream, nullptr, /*allow_exceptions=*/false);
  for (const auto& [key, fallback] :
       {std::pair{"head_table", "W_head.npy"}, std::pair{"gate_table", "T_gate.npy"}}) {
    const auto stated = manifest.is_object() ? manifest.find(key) : manifest.end();
    const bool named = stated != manifest.end() && stated->is_string();
    files.push_back(
        {key, absl::StrCat(directory, "/", named ? stated->get<std::string>() : fallback)});
  }
  return files;
}

absl::Status Import(Arguments arguments, Console& console) {
  NewTableFlags flags;
  std::optional<int64_t> budget;
  FlagParser parser("tables import",
                    "tables import DIRECTORY (--model-json FILE | --like FILE) --name NAME "
                    "--version V --out FILE",
                    "Makes a table file of a CompilerKV reference directory (manifest.json, "
                    "W_head.npy, T_gate.npy).");
  flags.AddTo(parser);
  parser.Int("--budget", "N", "the budget, when the directory states none", &budget);
  if (FlagParser::HelpAsked(arguments)) {
    console.out << parser.Help();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::vector<std::string> directories,
                           parser.Parse(arguments, 1, 1));
  KEEPSET_RETURN_IF_ERROR(flags.Check(ReferenceFiles(directories[0])));
  KEEPSET_RETURN_IF_ERROR(CheckFileExists("manifest", directories[0] + "/manifest.json"));
  if (budget.has_value() && *budget < 1) {
    return RefusedError(absl::StrCat("--budget=", *budget, ", want 1 or more"));
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::string model, ReadModelJson(flags.model));
  KEEPSET_RETURN_IF_ERROR(WriteStatus(FromEngine(
      keepset_table_import(directories[0].c_str(), model.c_str(), flags.name->c_str(),
                           flags.version->c_str(), budget.value_or(0), flags.out->c_str()))));
  return flags.Report(console);
}

struct TablesCommand {
  const char* name;
  const char* summary;
  absl::Status (*run)(Arguments arguments, Console& console);
};

constexpr TablesCommand kTablesCommands[] = {
    {"inspect", "what table files say", RunTablesInspect},
    {"validate", "whether table files are good", Validate},
    {"sign", "a signature beside each table file", RunTablesSign},
    {"diff", "what differs between two tables", RunTablesDiff},
    {"records", "what calibration records hold", RunTablesRecords},
    {"compile", "a table of calibration records", RunTablesCompile},
    {"import", "a table file of a CompilerKV reference directory", Import},
    {"uniform", "a neutral table for a model", Uniform},
};

}  // namespace

absl::Status RunTables(absl::Span<const std::string> arguments, Console& console) {
  std::vector<std::string> names;
  for (const TablesCommand& command : kTablesCommands) {
    if (!arguments.empty() && arguments[0] == command.name) {
      return command.run(arguments.subspan(1), console);
    }
    names.emplace_back(command.name);
  }
  if (FlagParser::HelpAsked(arguments)) {
    console.out << "usage: keepset tables COMMAND ...\n\n";
    for (const TablesCommand& command : kTablesCommands) {
      console.out << absl::StrFormat("  %-10s %s\n", command.name, command.summary);
    }
    return absl::OkStatus();
  }
  if (arguments.empty()) return UsageError("tables: no command (keepset tables --help lists them)");
  const std::string nearest = NearestName(arguments[0], names);
  return UsageError(
      absl::StrCat("unknown command \"tables ", arguments[0], "\"",
                   nearest.empty() ? "" : absl::StrCat(", did you mean ", nearest, "?"),
                   " (keepset tables --help lists them)"));
}

}  // namespace keepset::cli
