// What each version of a table answers for one prompt, and whether replies agree with that: no
// reply may be of two tables.
#ifndef KEEPSET_TESTS_INTEGRATION_TABLE_ANSWERS_H_
#define KEEPSET_TESTS_INTEGRATION_TABLE_ANSWERS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "clients/cpp/client.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::integration {

struct AnsweringTable {
  std::string name;
  std::string version;
  std::string file;
  std::string digest;
  // What the library answers with this table: tau and keep sets of every layer.
  std::vector<double> taus;
  std::vector<std::vector<int32_t>> sets;
};

// A uniform compilerkv table with these gates; tables with different gates answer differently.
AnsweringTable MakeAnsweringTable(const fakes::SyntheticPrompt& prompt, const std::string& name,
                                  const std::string& version, float gate, int64_t budget_tokens);

using TablesByDigest = std::map<std::string, AnsweringTable>;

// What went wrong first, and how often each version answered. Thread-safe.
class Findings {
 public:
  // `want_digest` empty: any of `tables`.
  void Add(const absl::StatusOr<client::OperationResult>& result, const TablesByDigest& tables,
           const std::string& want_digest);

  std::string first_complaint() const;
  int64_t answers(const std::string& version) const;
  int64_t failed() const;  // operations without an answer
  int64_t mixed() const;   // answers that are not wholly of the table they name, or of another one

 private:
  void Complain(int64_t& count, std::string text) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable absl::Mutex mutex_;
  std::string complaint_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, int64_t> answers_ ABSL_GUARDED_BY(mutex_);
  int64_t failed_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t mixed_ ABSL_GUARDED_BY(mutex_) = 0;
};

absl::StatusOr<client::OperationResult> SendAndFinish(
    client::CompressStream& stream, uint64_t operation,
    const std::vector<client::LayerInput>& layers);
absl::StatusOr<client::OperationResult> RunOnce(client::CompressStream& stream,
                                                const client::OperationSpec& spec,
                                                const std::vector<client::LayerInput>& layers);

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_TABLE_ANSWERS_H_
