#include "service/metrics/operation_totals.h"

#include <algorithm>

#include "absl/status/status.h"
#include "base/text.h"
#include "service/metrics/metric_names.h"

namespace keepset::service {
namespace {

// A request may name its model at any length.
constexpr size_t kMaxModelName = 128;

std::vector<OperationTotal> ValuesOf(const auto& rows) {
  std::vector<OperationTotal> values;
  values.reserve(rows.size());
  for (const auto& [key, total] : rows) values.push_back(total);
  return values;
}

}  // namespace

void OperationTotals::OpenSession(absl::string_view session_id) {
  absl::MutexLock lock(&mutex_);
  sessions_.try_emplace(std::string(session_id));
}

void OperationTotals::ForgetSession(absl::string_view session_id) {
  absl::MutexLock lock(&mutex_);
  sessions_.erase(session_id);
}

void OperationTotals::Record(const OperationSample& sample, absl::string_view session_id) {
  Key key = {std::string(CutText(sample.model, kMaxModelName)), sample.policy};
  if (sample.table.has_value()) {
    key[2] = sample.table->name;
    key[3] = sample.table->version;
    key[4] = sample.table->digest;
  }
  absl::MutexLock lock(&mutex_);
  Add(key, sample, kMaxRows, all_);
  const auto session = sessions_.find(session_id);
  if (session != sessions_.end()) Add(key, sample, kMaxRowsPerSession, session->second);
}

void OperationTotals::Add(const Key& key, const OperationSample& sample, size_t max_rows,
                          Rows& rows) {
  auto row = rows.find(key);
  if (row == rows.end()) {
    const bool fits = rows.size() + 1 < max_rows;  // the last row is everybody else's
    row = rows.try_emplace(fits ? key : Key{std::string(kOtherValue), std::string(kOtherValue)})
              .first;
    row->second.model = row->first[0];
    row->second.policy = row->first[1];
    if (fits) row->second.table = sample.table;
  }
  OperationTotal& total = row->second;
  ++total.outcomes[{sample.outcome, sample.reason}];
  for (int i = 0; i < kNumStages; ++i) {
    if (sample.stages[i] <= absl::ZeroDuration()) continue;
    OperationTotal::StageTotal& stage = total.stages[i];
    ++stage.count;
    stage.time += sample.stages[i];
    stage.longest = std::max(stage.longest, sample.stages[i]);
  }
  total.input_tokens += sample.input_tokens;
  total.kept_tokens += sample.kept_tokens;
  total.bytes_before += sample.bytes_before;
  total.bytes_after += sample.bytes_after;
}

std::vector<OperationTotal> OperationTotals::All() const {
  absl::MutexLock lock(&mutex_);
  return ValuesOf(all_);
}

absl::StatusOr<std::vector<OperationTotal>> OperationTotals::OfSession(
    absl::string_view session_id) const {
  absl::MutexLock lock(&mutex_);
  const auto session = sessions_.find(session_id);
  if (session == sessions_.end()) {
    return absl::NotFoundError(
        "session_id: no such session, it may have ended; want an open one or none");
  }
  return ValuesOf(session->second);
}

}  // namespace keepset::service
