// keepset.h: tables.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "engine/c_abi/handles.h"
#include "tables/observation_heads_table.h"
#include "tables/safetensors.h"
#include "tables/table_file.h"
#include "tables/table_signature.h"

using ::keepset::engine::Guard;
using ::keepset::engine::RequirePointer;

extern "C" {

keepset_status keepset_table_load(const char* path, keepset_table** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(path, "path"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    auto table = std::make_unique<keepset_table>();
    KEEPSET_ASSIGN_OR_RETURN(table->table, keepset::tables::ReadTable(path));
    table->kind = std::string(table->table->kind());
    table->inspection = keepset::tables::InspectTable(*table->table);
    *out = table.release();
    return absl::OkStatus();
  });
}

void keepset_table_destroy(keepset_table* table) { delete table; }

const char* keepset_table_name(const keepset_table* table) {
  return table->table->identity().name.c_str();
}
const char* keepset_table_version(const keepset_table* table) {
  return table->table->identity().version.c_str();
}
const char* keepset_table_digest(const keepset_table* table) {
  return table->table->identity().digest.c_str();
}
const char* keepset_table_kind(const keepset_table* table) { return table->kind.c_str(); }
const char* keepset_table_inspect(const keepset_table* table) { return table->inspection.c_str(); }

keepset_status keepset_table_diff(keepset_table* a, const keepset_table* b, const char** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(a, "a"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(b, "b"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    a->difference = absl::StrJoin(keepset::tables::DiffTables(*a->table, *b->table), "\n");
    *out = a->difference.c_str();
    return absl::OkStatus();
  });
}

keepset_status keepset_table_compare(keepset_table* a, const keepset_table* b, const char** out) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(a, "a"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(b, "b"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out, "out"));
    a->comparison = keepset::tables::CompareTables(*a->table, *b->table);
    *out = a->comparison.c_str();
    return absl::OkStatus();
  });
}

keepset_status keepset_table_values(const keepset_table* table, const char* tensor,
                                    const float** values, size_t* count) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(table, "table"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(tensor, "tensor"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(values, "values"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(count, "count"));
    const keepset::tables::CompilerKvTable* compilerkv = table->table->AsCompilerKv();
    absl::Span<const float> found;
    if (compilerkv != nullptr && absl::string_view(tensor) == "head_weights") {
      found = compilerkv->head_weights();
    } else if (compilerkv != nullptr && absl::string_view(tensor) == "gate_thresholds") {
      found = compilerkv->gate_thresholds();
    } else {
      return absl::NotFoundError(absl::StrCat("tensor ", tensor, ", want head_weights or ",
                                              "gate_thresholds of a compilerkv table"));
    }
    *values = found.data();
    *count = found.size();
    return absl::OkStatus();
  });
}

keepset_status keepset_table_write_uniform(const char* path, const char* name, const char* version,
                                           const char* model_json, float head_weight, float gate,
                                           const int64_t* budgets, size_t num_budgets) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(path, "path"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(name, "name"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(version, "version"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(model_json, "model_json"));
    KEEPSET_ASSIGN_OR_RETURN(const keepset::tables::ModelFingerprint model,
                             keepset::tables::ParseModelFingerprint(model_json, "model"));
    keepset::tables::CompilerKvTableContent content =
        keepset::tables::UniformTable(model, head_weight, gate);
    content.name = name;
    content.version = version;
    if (budgets != nullptr && num_budgets > 0) {
      // The same slice under every budget.
      const std::vector<float> weights = content.head_weights;
      const std::vector<float> gates = content.gate_thresholds;
      content.budgets.assign(budgets, budgets + num_budgets);
      for (size_t i = 1; i < num_budgets; ++i) {
        content.head_weights.insert(content.head_weights.end(), weights.begin(), weights.end());
        content.gate_thresholds.insert(content.gate_thresholds.end(), gates.begin(), gates.end());
      }
    }
    KEEPSET_ASSIGN_OR_RETURN(const std::string bytes, keepset::tables::SerializeTable(content));
    return keepset::tables::WriteFileAtomically(path, bytes);
  });
}

keepset_status keepset_table_write_heads(const char* path, const char* name, const char* version,
                                         const char* model_json,
                                         const keepset_head_observation* observations,
                                         size_t num_observations, int64_t pool_kernel,
                                         int64_t dilate) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(path, "path"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(name, "name"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(version, "version"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(model_json, "model_json"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(observations, "observations"));
    keepset::tables::ObservationHeadsContent content;
    content.name = name;
    content.version = version;
    KEEPSET_ASSIGN_OR_RETURN(content.model,
                             keepset::tables::ParseModelFingerprint(model_json, "model"));
    for (size_t i = 0; i < num_observations; ++i) {
      const keepset_head_observation& one = observations[i];
      content.observations.push_back(
          {one.layer, one.head, static_cast<keepset::tables::ObservedRows>(one.rows), one.weight});
    }
    content.settings.pool_kernel = pool_kernel;
    content.settings.dilate = dilate;
    content.provenance_json = R"({"source": "hand-written"})";
    KEEPSET_ASSIGN_OR_RETURN(const std::string bytes, keepset::tables::SerializeTable(content));
    return keepset::tables::WriteFileAtomically(path, bytes);
  });
}

keepset_status keepset_table_import(const char* directory, const char* model_json, const char* name,
                                    const char* version, int64_t budget, const char* out_path) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(directory, "directory"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(model_json, "model_json"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(name, "name"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(version, "version"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(out_path, "out_path"));
    keepset::tables::ImportOptions options;
    options.name = name;
    options.version = version;
    KEEPSET_ASSIGN_OR_RETURN(options.model,
                             keepset::tables::ParseModelFingerprint(model_json, "model"));
    if (budget != 0) options.budget = budget;
    KEEPSET_ASSIGN_OR_RETURN(const keepset::tables::CompilerKvTableContent content,
                             keepset::tables::ImportReferenceDirectory(directory, options));
    KEEPSET_ASSIGN_OR_RETURN(const std::string bytes, keepset::tables::SerializeTable(content));
    return keepset::tables::WriteFileAtomically(out_path, bytes);
  });
}

keepset_status keepset_table_sign(const char* path, const char* key_path) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(path, "path"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(key_path, "key_path"));
    return keepset::tables::SignTableFile(path, key_path);
  });
}

keepset_status keepset_table_verify(const char* path, const char* public_key_path) {
  return Guard([&]() -> absl::Status {
    KEEPSET_RETURN_IF_ERROR(RequirePointer(path, "path"));
    KEEPSET_RETURN_IF_ERROR(RequirePointer(public_key_path, "public_key_path"));
    const std::string key_path = public_key_path;
    KEEPSET_ASSIGN_OR_RETURN(const keepset::tables::TrustedKeys keys,
                             keepset::tables::TrustedKeys::Read({&key_path, 1}));
    return keepset::tables::VerifyTableFile(path, keys);
  });
}

}  // extern "C"
