// The JSON document of a result file, from what a server answered: the same keys in the same order
// as the engine writes them.
#ifndef KEEPSET_CLIENTS_CLI_REMOTE_RESULT_JSON_H_
#define KEEPSET_CLIENTS_CLI_REMOTE_RESULT_JSON_H_

#include <string>

#include "clients/cpp/operation.h"

namespace keepset::cli {

std::string RemoteResultJson(const client::OperationResult& result);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_REMOTE_RESULT_JSON_H_
