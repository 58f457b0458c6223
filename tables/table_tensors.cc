#include "tables/table_tensors.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxBudget = INT32_MAX;

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

}  // namespace

std::string TensorWhere(const SafetensorsFile& file, absl::string_view name) {
  return absl::StrCat(file.label(), ": tensor ", name);
}

absl::StatusOr<const TensorInfo*> RequireTensor(const SafetensorsFile& file, absl::string_view name,
                                                TensorDType dtype, int rank) {
  const TensorInfo* tensor = file.Find(name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(TensorWhere(file, name), " is missing, want ",
                                                   TensorDTypeName(dtype), " with ", rank,
                                                   " dimensions"));
  }
  if (tensor->dtype != dtype) {
    return FieldError(TensorWhere(file, name), "dtype", TensorDTypeName(tensor->dtype),
                      TensorDTypeName(dtype));
  }
  if (tensor->shape.size() != rank) {
    return FieldError(TensorWhere(file, name), "shape", ShapeText(tensor->shape),
                      absl::StrCat(rank, " dimensions"));
  }
  return tensor;
}

absl::Status RequireShape(const SafetensorsFile& file, const TensorInfo& tensor,
                          const std::vector<int64_t>& want, absl::string_view meaning) {
  if (tensor.shape == want) return absl::OkStatus();
  return FieldError(TensorWhere(file, tensor.name), "shape", ShapeText(tensor.shape),
                    absl::StrCat(ShapeText(want), " ", meaning));
}

namespace {

absl::StatusOr<std::vector<int64_t>> ReadBudgetList(const SafetensorsFile& file) {
  if (file.Find("budgets") == nullptr) return std::vector<int64_t>();
  KEEPSET_ASSIGN_OR_RETURN(const TensorInfo* tensor,
                           RequireTensor(file, "budgets", TensorDType::kI64, 1));
  KEEPSET_ASSIGN_OR_RETURN(std::vector<int64_t> budgets, ReadInts(file, *tensor));
  const std::string where = TensorWhere(file, "budgets");
  if (budgets.empty()) {
    return FieldError(where, "shape", "[0]", "at least one budget, or no budgets tensor");
  }
  std::set<int64_t> seen;
  for (std::size_t i = 0; i < budgets.size(); ++i) {
    if (budgets[i] < 1 || budgets[i] > kMaxBudget || !seen.insert(budgets[i]).second) {
      return FieldError(where, absl::StrCat("element[", i, "]"), absl::StrCat(budgets[i]),
                        absl::StrCat("distinct budgets in 1..", kMaxBudget));
    }
  }
  return budgets;
}

absl::StatusOr<std::optional<int64_t>> ReadDefaultBudget(const Json& document,
                                                         const std::vector<int64_t>& budgets,
                                                         absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<int64_t> budget,
                           OptionalIntField(document, "default_budget", 1, kMaxBudget, where));
  if (budget.has_value() && !budgets.empty() &&
      std::find(budgets.begin(), budgets.end(), *budget) == budgets.end()) {
    return FieldError(where, "default_budget", absl::StrCat(*budget),
                      absl::StrCat("one of budgets ", absl::StrJoin(budgets, ", ")));
  }
  return budget;
}

}  // namespace

absl::StatusOr<TableBudgets> ReadTableBudgets(const SafetensorsFile& file, const Json& document) {
  TableBudgets budgets;
  KEEPSET_ASSIGN_OR_RETURN(budgets.all, ReadBudgetList(file));
  KEEPSET_ASSIGN_OR_RETURN(budgets.by_default,
                           ReadDefaultBudget(document, budgets.all, file.label()));
  return budgets;
}

}  // namespace keepset::tables
