// What either path of `keepset compress` answers, ready to be written as a result file.
#ifndef KEEPSET_CLIENTS_CLI_COMPRESS_ANSWER_H_
#define KEEPSET_CLIENTS_CLI_COMPRESS_ANSWER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/compress_options.h"
#include "clients/cli/prefill_request.h"
#include "clients/cpp/operation.h"

namespace keepset::cli {

// Set number of a set that all KV heads share.
inline constexpr int64_t kSharedSet = -1;

struct AnswerSet {
  int64_t layer = 0;
  int64_t set = kSharedSet;
  std::vector<int32_t> keep_indices;
};

// [num_kv_heads, n, d] of a shared set, [n, d] of one head's.
struct AnswerRows {
  int64_t layer = 0;
  int64_t set = kSharedSet;
  int64_t num_tokens = 0;
  std::vector<std::byte> k;
  std::vector<std::byte> v;
};

struct CompressAnswer {
  std::string result_json;  // the JSON document of the result file
  std::vector<AnswerSet> sets;
  std::vector<AnswerRows> rows;
  std::string transport;  // "in_process", "memfd", "inline"
  std::vector<std::pair<std::string, double>> stage_seconds;
  std::optional<client::ShadowResult> shadow;  // when a shadow table was asked
};

absl::StatusOr<CompressAnswer> CompressInProcess(const CompressOptions& options,
                                                 const PrefillRequest& request);
absl::StatusOr<CompressAnswer> CompressByServer(const CompressOptions& options,
                                                const PrefillRequest& request);

// "policy NAME": a usage error that lists `known` when it is none of them.
absl::Status CheckPolicyKnown(const std::string& policy, const std::vector<std::string>& known);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_COMPRESS_ANSWER_H_
