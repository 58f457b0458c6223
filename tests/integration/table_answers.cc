#include "tests/integration/table_answers.h"

#include <gtest/gtest.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "tables/table_file.h"
#include "tests/engine/run_operation.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/typed_worker.h"

namespace keepset::integration {

AnsweringTable MakeAnsweringTable(const fakes::SyntheticPrompt& prompt, const std::string& name,
                                  const std::string& version, float gate, int64_t budget_tokens) {
  AnsweringTable made;
  made.name = name;
  made.version = version;
  made.file = TableFileFor(prompt, name, version, gate);
  made.digest = fakes::DigestOf(made.file);
  engine::OperationSpec spec = prompt.spec();
  spec.policy = "compilerkv";
  spec.budget.kind = engine::Budget::Kind::kTokens;
  spec.budget.tokens = budget_tokens;
  spec.ppl = 10.0;
  auto table = tables::ParseTable(
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(made.file.data()), made.file.size()),
      "table");
  EXPECT_TRUE(table.ok()) << table.status();
  spec.table = *std::move(table);
  const absl::StatusOr<engine::OperationResult> result = engine::Bench().Run(spec, prompt);
  EXPECT_TRUE(result.ok()) << result.status();
  for (const engine::LayerResult& layer : result->layers) {
    made.taus.push_back(*layer.tau);
    made.sets.push_back(layer.keep_indices[0]);
  }
  return made;
}

void Findings::Add(const absl::StatusOr<client::OperationResult>& result,
                   const TablesByDigest& tables, const std::string& want_digest) {
  absl::MutexLock lock(&mutex_);
  if (!result.ok()) {
    Complain(failed_, absl::StrCat("failed: ", result.status().ToString()));
    return;
  }
  if (!result->table.has_value()) {
    Complain(mixed_, "no table in the reply");
    return;
  }
  ++answers_[result->table->version];
  if (!want_digest.empty() && result->table->digest != want_digest) {
    Complain(mixed_, absl::StrCat("want ", want_digest, ", answered by ", result->table->digest));
    return;
  }
  const auto table = tables.find(result->table->digest);
  if (table == tables.end()) {
    Complain(mixed_, absl::StrCat("a table that was never written: ", result->table->digest));
    return;
  }
  for (size_t l = 0; l < result->layers.size(); ++l) {
    const client::LayerResult& layer = result->layers[l];
    if (layer.tau != table->second.taus[l] || layer.sets[0].keep_indices != table->second.sets[l]) {
      Complain(mixed_, absl::StrCat("layer ", l, " is not of version ", result->table->version));
      return;
    }
  }
}

std::string Findings::first_complaint() const {
  absl::MutexLock lock(&mutex_);
  return complaint_;
}

int64_t Findings::answers(const std::string& version) const {
  absl::MutexLock lock(&mutex_);
  const auto it = answers_.find(version);
  return it == answers_.end() ? 0 : it->second;
}

int64_t Findings::failed() const {
  absl::MutexLock lock(&mutex_);
  return failed_;
}

int64_t Findings::mixed() const {
  absl::MutexLock lock(&mutex_);
  return mixed_;
}

void Findings::Complain(int64_t& count, std::string text) {
  ++count;
  if (complaint_.empty()) complaint_ = std::move(text);
}

absl::StatusOr<client::OperationResult> SendAndFinish(
    client::CompressStream& stream, uint64_t operation,
    const std::vector<client::LayerInput>& layers) {
  for (const client::LayerInput& layer : layers) {
    if (absl::Status sent = stream.SendLayer(operation, layer); !sent.ok()) return sent;
  }
  return stream.Finish(operation);
}

absl::StatusOr<client::OperationResult> RunOnce(client::CompressStream& stream,
                                                const client::OperationSpec& spec,
                                                const std::vector<client::LayerInput>& layers) {
  const absl::StatusOr<uint64_t> operation = stream.Begin(spec);
  if (!operation.ok()) return operation.status();
  return SendAndFinish(stream, *operation, layers);
}

}  // namespace keepset::integration
