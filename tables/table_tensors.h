// Tensors and fields that several kinds of table read the same way. Private to tables/.
//
// Errors are InvalidArgument and name file, tensor, value and what would be right.
#ifndef KEEPSET_TABLES_TABLE_TENSORS_H_
#define KEEPSET_TABLES_TABLE_TENSORS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"
#include "tables/safetensors.h"

namespace keepset::tables {

// "FILE: tensor NAME".
std::string TensorWhere(const SafetensorsFile& file, absl::string_view name);

// The tensor `name`, of this dtype and number of dimensions.
absl::StatusOr<const TensorInfo*> RequireTensor(const SafetensorsFile& file, absl::string_view name,
                                                TensorDType dtype, int rank);

// `meaning` says in the message what the dimensions stand for.
absl::Status RequireShape(const SafetensorsFile& file, const TensorInfo& tensor,
                          const std::vector<int64_t>& want, absl::string_view meaning);

struct TableBudgets {
  std::vector<int64_t> all;           // [N_B], distinct and positive
  std::optional<int64_t> by_default;  // one of `all` when there are any
};
// Tensor `budgets` I64 [N_B] and key `default_budget`, both optional.
absl::StatusOr<TableBudgets> ReadTableBudgets(const SafetensorsFile& file,
                                              const nlohmann::json& document);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_TABLE_TENSORS_H_
