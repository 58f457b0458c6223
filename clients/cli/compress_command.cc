// keepset compress: one capture in, one result file out.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "clients/cli/command_list.h"
#include "clients/cli/compress_answer.h"
#include "clients/cli/compress_options.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"
#include "clients/cli/flag_parser.h"
#include "clients/cli/prefill_request.h"

namespace keepset::cli {
namespace {

using Json = nlohmann::ordered_json;

absl::Status WriteAnswer(const CompressOptions& options, const PrefillRequest& request,
                         const CompressAnswer& answer) {
  std::vector<keepset_index_set> sets;
  for (const AnswerSet& set : answer.sets) {
    sets.push_back({set.layer, set.set, set.keep_indices.data(),
                    static_cast<int64_t>(set.keep_indices.size())});
  }
  std::vector<keepset_gathered_layer> rows;
  for (const AnswerRows& kept : answer.rows) {
    keepset_gathered_layer layer = {};
    layer.layer = kept.layer;
    layer.set = kept.set;
    layer.dtype = request.spec().kv_dtype;
    layer.num_kv_heads = kept.set == kSharedSet ? request.num_kv_heads() : 1;
    layer.num_tokens = kept.num_tokens;
    layer.k_head_dim = request.head_dim();
    layer.v_head_dim = request.value_head_dim();
    layer.k = kept.k.data();
    layer.v = kept.v.data();
    rows.push_back(layer);
  }
  const absl::Status written =
      FromEngine(keepset_result_write(options.out.c_str(), answer.result_json.c_str(), sets.data(),
                                      sets.size(), rows.data(), rows.size()));
  // The input was fine; what is in the way is the disk or its permissions.
  return WithExitCode(WithPrefix("result", written), ExitCode::kFailed);
}

// The engine knows policies and tensors; which file and which flag they came from is known here.
absl::Status NameFilesAndFlags(const CompressOptions& options, const absl::Status& status) {
  if (ExitCodeOf(status) != ExitCode::kRefused) return status;
  // What is wrong with the table file is no matter of the capture.
  if (options.table.has_value() && absl::StrContains(status.message(), *options.table)) {
    return status;
  }
  std::string hint;
  if (absl::IsNotFound(status) && !options.table.has_value() &&
      !options.server.address.has_value()) {
    hint = "; give one with --table FILE";
  } else if (absl::IsFailedPrecondition(status) && options.table.has_value()) {
    hint = absl::StrCat("; the table is ", *options.table);
  } else if (absl::StrContains(status.message(), "missing ppl")) {
    hint = "; give it with --ppl X";
  }
  absl::Status hinted(status.code(), absl::StrCat(status.message(), hint));
  if (absl::StrContains(status.message(), options.capture)) return hinted;
  return WithPrefix(options.capture, hinted);
}

absl::StatusOr<CompressAnswer> Answer(const CompressOptions& options,
                                      const PrefillRequest& request) {
  absl::StatusOr<CompressAnswer> answer = options.server.address.has_value()
                                              ? CompressByServer(options, request)
                                              : CompressInProcess(options, request);
  if (!answer.ok()) return NameFilesAndFlags(options, answer.status());
  return answer;
}

std::string Size(double bytes) {
  return bytes < 1e6 ? absl::StrFormat("%.1f kB", bytes / 1e3)
                     : absl::StrFormat("%.1f MB", bytes / 1e6);
}

std::string Size(const Json& bytes) { return bytes.is_number() ? Size(bytes.get<double>()) : "?"; }

// "512" or "488..512": the smallest and the largest count of all sets.
std::string KeptRange(const CompressAnswer& answer) {
  size_t low = SIZE_MAX;
  size_t high = 0;
  for (const AnswerSet& set : answer.sets) {
    low = std::min(low, set.keep_indices.size());
    high = std::max(high, set.keep_indices.size());
  }
  return low == high ? absl::StrFormat("%d", low) : absl::StrFormat("%d..%d", low, high);
}

std::string ShadowText(const client::ShadowResult& shadow) {
  if (!shadow.error.empty()) return absl::StrFormat("shadow   none: %s\n", shadow.error);
  return absl::StrFormat("shadow   %s %s keeps %.1f %% of these positions, %s\n", shadow.table.name,
                         shadow.table.version, 1e2 * shadow.kept_overlap,
                         Size(static_cast<double>(shadow.would_be_bytes)));
}

Json ShadowJson(const client::ShadowResult& shadow) {
  Json out = Json::object();
  if (!shadow.error.empty()) {
    out["error"] = shadow.error;
    return out;
  }
  out["table"] = {{"name", shadow.table.name},
                  {"version", shadow.table.version},
                  {"digest", shadow.table.digest}};
  out["kept_overlap"] = shadow.kept_overlap;
  out["would_be_bytes"] = shadow.would_be_bytes;
  return out;
}

void PrintSummary(const CompressOptions& options, const Json& document,
                  const CompressAnswer& answer, Console& console) {
  const auto text = [&document](const char* key) {
    return document.contains(key) && document[key].is_string() ? document[key].get<std::string>()
                                                               : std::string("-");
  };
  console.out << absl::StrFormat("%s by %s, scope %s, reason %s\n", text("outcome"), text("policy"),
                                 text("scope"), text("reason"));
  console.out << absl::StrFormat("kept     %s of %s positions, %s -> %s\n", KeptRange(answer),
                                 document["seq_len"].dump(), Size(document["bytes_before"]),
                                 Size(document["bytes_after"]));
  if (document["table"].is_object()) {
    const Json& table = document["table"];
    console.out << absl::StrFormat("table    %s %s %s\n", table["name"].get<std::string>(),
                                   table["version"].get<std::string>(),
                                   table["digest"].get<std::string>());
    console.out << absl::StrFormat("signals  entropy %s (bin %s), ppl %s (bin %s)\n",
                                   document["entropy"].dump(), document["entropy_bin"].dump(),
                                   document["ppl"].dump(), document["ppl_bin"].dump());
  }
  if (answer.shadow.has_value()) console.out << ShadowText(*answer.shadow);
  for (const char* key : {"defaulted_inputs", "relaxed"}) {
    if (!document[key].empty()) console.out << key << " " << document[key].dump() << "\n";
  }
  console.out << "path     " << answer.transport << ", " << text("backend");
  for (const auto& [stage, seconds] : answer.stage_seconds) {
    if (seconds > 0) console.out << absl::StrFormat(", %s %.2f ms", stage, 1e3 * seconds);
  }
  console.out << "\nwrote    " << options.out << "\n";
}

void PrintJson(Json document, const CompressAnswer& answer, Console& console) {
  document["transport"] = answer.transport;
  Json seconds = Json::object();
  for (const auto& [stage, value] : answer.stage_seconds) seconds[stage] = value;
  document["stage_seconds"] = std::move(seconds);
  if (answer.shadow.has_value()) document["shadow"] = ShadowJson(*answer.shadow);
  console.out << document.dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
}

}  // namespace

absl::Status RunCompress(absl::Span<const std::string> arguments, Console& console) {
  if (FlagParser::HelpAsked(arguments)) {
    console.out << CompressHelp();
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(const CompressOptions options, ParseCompressOptions(arguments));
  std::vector<InputFile> inputs = {{"capture", options.capture}};
  if (options.table.has_value()) inputs.push_back({"table", *options.table});
  KEEPSET_RETURN_IF_ERROR(CheckOutput("--out", options.out, inputs));
  if (options.table.has_value()) {
    KEEPSET_RETURN_IF_ERROR(CheckFileExists("table", *options.table));
  }
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<PrefillRequest> request,
                           PrefillRequest::Open(options));
  KEEPSET_ASSIGN_OR_RETURN(const CompressAnswer answer, Answer(options, *request));
  KEEPSET_RETURN_IF_ERROR(WriteAnswer(options, *request, answer));
  const Json document = Json::parse(answer.result_json, nullptr, false);
  if (!document.is_object()) return absl::InternalError("result: not a JSON object");
  if (console.format == OutputFormat::kJson) PrintJson(document, answer, console);
  if (console.wants_summary()) PrintSummary(options, document, answer, console);
  return absl::OkStatus();
}

}  // namespace keepset::cli
