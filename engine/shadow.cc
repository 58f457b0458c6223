#include "engine/shadow.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "engine/operation.h"

namespace keepset::engine {
namespace {

// Both ascending.
int64_t CountCommon(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  int64_t common = 0;
  for (auto i = a.begin(), j = b.begin(); i != a.end() && j != b.end();) {
    if (*i == *j) ++common;
    const bool advance_a = *i <= *j;
    const bool advance_b = *j <= *i;
    if (advance_a) ++i;
    if (advance_b) ++j;
  }
  return common;
}

class ShadowOfOperation final : public ShadowDecision {
 public:
  ShadowOfOperation(std::unique_ptr<Operation> shadow, const OperationResult& decided)
      : shadow_(std::move(shadow)),
        decided_layers_(decided.layers),
        decided_bytes_(decided.bytes_after) {}

  absl::StatusOr<ShadowReport> Finish() override {
    KEEPSET_ASSIGN_OR_RETURN(const OperationResult* const result, shadow_->Finish());
    ShadowReport report;
    if (result->table.has_value()) report.table = *result->table;
    report.kept_overlap = KeptOverlap(decided_layers_, result->layers);
    report.decided_bytes = decided_bytes_;
    report.would_be_bytes = result->bytes_after;
    report.time = result->times.score + result->times.select;
    return report;
  }

 private:
  const std::unique_ptr<Operation> shadow_;
  const std::vector<LayerResult> decided_layers_;
  const int64_t decided_bytes_;
};

}  // namespace

std::unique_ptr<ShadowDecision> NewShadowDecision(std::unique_ptr<Operation> shadow,
                                                  const OperationResult& decided) {
  return std::make_unique<ShadowOfOperation>(std::move(shadow), decided);
}

double KeptOverlap(const std::vector<LayerResult>& decided, const std::vector<LayerResult>& other) {
  KEEPSET_CHECK(decided.size() == other.size());
  double sum = 0;
  for (size_t l = 0; l < decided.size(); ++l) {
    const auto& sets = decided[l].keep_indices;
    KEEPSET_CHECK(sets.size() == other[l].keep_indices.size());
    int64_t kept = 0;
    int64_t common = 0;
    for (size_t s = 0; s < sets.size(); ++s) {
      kept += static_cast<int64_t>(sets[s].size());
      common += CountCommon(sets[s], other[l].keep_indices[s]);
    }
    // A layer never ends empty.
    sum += static_cast<double>(common) / static_cast<double>(std::max<int64_t>(kept, 1));
  }
  return sum / static_cast<double>(std::max<size_t>(decided.size(), 1));
}

}  // namespace keepset::engine
