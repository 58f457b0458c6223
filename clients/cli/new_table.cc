#include "clients/cli/new_table.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {

using Json = nlohmann::ordered_json;

void NewTableFlags::AddTo(FlagParser& parser) {
  parser.Text("--model-json", "FILE", "the model's fingerprint as a JSON object", &model.file)
      .Text("--like", "FILE", "take the model from this capture or table", &model.like)
      .Text("--name", "NAME", "the table's name", &name)
      .Text("--version", "V", "the table's version", &version)
      .Text("--out", "FILE", "table file to write", &out)
      .Switch("--json", "print what was written as JSON", &json)
      .Alias("-o", "--out");
}

absl::Status NewTableFlags::Check(std::vector<InputFile> inputs) const {
  for (const auto& [flag, value] :
       {std::pair{"--name", &name}, std::pair{"--version", &version}, std::pair{"--out", &out}}) {
    if (!value->has_value() || (*value)->empty()) {
      return UsageError(absl::StrCat(flag, " is missing"));
    }
  }
  if (model.file.has_value()) inputs.push_back({"--model-json", *model.file});
  if (model.like.has_value()) inputs.push_back({"--like", *model.like});
  return CheckOutput("--out", *out, inputs);
}

absl::Status NewTableFlags::Report(Console& console, const std::string& report_json) const {
  KEEPSET_ASSIGN_OR_RETURN(const TableHandle table, LoadTable(*out));
  const char* digest = keepset_table_digest(table.get());
  if (json) {
    Json written = {{"file", *out}, {"name", *name}, {"version", *version}, {"digest", digest}};
    if (!report_json.empty()) written["report"] = Json::parse(report_json, nullptr, false);
    console.out << written.dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
  }
  if (console.wants_summary()) console.out << "wrote " << *out << " " << digest << "\n";
  return absl::OkStatus();
}

absl::Status WriteStatus(const absl::Status& status) {
  if (absl::IsResourceExhausted(status) || absl::IsPermissionDenied(status)) {
    return WithExitCode(status, ExitCode::kFailed);
  }
  return status;
}

}  // namespace keepset::cli
