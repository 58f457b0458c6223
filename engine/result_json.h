// The JSON document of a result (formats.md "Result").
#ifndef KEEPSET_ENGINE_RESULT_JSON_H_
#define KEEPSET_ENGINE_RESULT_JSON_H_

#include <string>

#include "engine/operation_types.h"

namespace keepset::engine {

// One line. Values without a meaning for this policy or outcome are null.
std::string ResultJson(const OperationResult& result);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_RESULT_JSON_H_
