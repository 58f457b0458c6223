// What a second table would have kept of an operation that another table decides.
//
// The shadow is an operation of its own over the deciding one's observations; it never sees a
// caller and is never applied. Its cuts are made when it is finished, which may be long after the
// deciding operation was answered and is gone.
#ifndef KEEPSET_ENGINE_SHADOW_H_
#define KEEPSET_ENGINE_SHADOW_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/operation_types.h"

namespace keepset::engine {

class Operation;

struct ShadowReport {
  tables::TableIdentity table;
  // |A and B| / |A| with A what was decided and B what the shadow table would have kept; counted
  // over the KV heads of a layer, mean over layers.
  double kept_overlap = 0;
  int64_t decided_bytes = 0;   // K and V of all layers that stay
  int64_t would_be_bytes = 0;  // by the shadow table
  absl::Duration time;         // scores and cuts of the shadow alone
};

// Used by one thread at a time; not the deciding operation's necessarily. The backend, policies and
// clock of that operation must outlive it.
class ShadowDecision {
 public:
  virtual ~ShadowDecision() = default;
  // Once.
  virtual absl::StatusOr<ShadowReport> Finish() = 0;
};

// `shadow` has observed every layer `decided` is about.
std::unique_ptr<ShadowDecision> NewShadowDecision(std::unique_ptr<Operation> shadow,
                                                  const OperationResult& decided);

// Both lists hold the same layers, each with as many sets.
double KeptOverlap(const std::vector<LayerResult>& decided, const std::vector<LayerResult>& other);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_SHADOW_H_
