#include "clients/cli/model_source.h"

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cli/engine_handles.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {
namespace {

absl::StatusOr<std::string> ModelOf(const std::string& path, const std::string& document) {
  const nlohmann::json json = nlohmann::json::parse(document, nullptr, false);
  if (!json.is_object()) return RefusedError(absl::StrCat(path, ": not a JSON object"));
  const auto model = json.find("model");
  return model != json.end() && model->is_object() ? model->dump() : json.dump();
}

// With the counts that the capture states beside its model.
absl::StatusOr<std::string> ModelOfCapture(const std::string& path,
                                           const keepset_capture* capture) {
  keepset_operation_spec spec = {};
  spec.struct_size = sizeof(spec);
  const absl::Status filled = FromEngine(keepset_capture_fill_spec(capture, &spec));
  if (!filled.ok()) return WithPrefix(path, filled);
  return ModelOf(path, spec.model_json);
}

}  // namespace

absl::StatusOr<std::string> ReadModelJson(const ModelSource& source) {
  if (source.file.has_value() == source.like.has_value()) {
    return UsageError("want one of --model-json FILE and --like FILE");
  }
  if (source.file.has_value()) {
    KEEPSET_RETURN_IF_ERROR(CheckFileExists("--model-json", *source.file));
    std::ifstream stream(*source.file, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(stream),
                           std::istreambuf_iterator<char>()};
    return ModelOf(*source.file, text);
  }
  const absl::StatusOr<CaptureHandle> capture = OpenCapture(*source.like);
  if (capture.ok()) return ModelOfCapture(*source.like, capture->get());
  const absl::StatusOr<TableHandle> table = LoadTable(*source.like);
  if (table.ok()) return ModelOf(*source.like, keepset_table_inspect(table->get()));
  if (ExitCodeOf(capture.status()) == ExitCode::kUsage) return capture.status();
  return RefusedError(absl::StrCat("--like ", *source.like, " is neither a capture (",
                                   capture.status().message(), ") nor a table (",
                                   table.status().message(), ")"));
}

}  // namespace keepset::cli
