// One compression, from first layer to keep sets:
//
//   Begin(spec) -> Observe(0) ... Observe(L-1) -> Finish -> Gather(layer) ...
//
// or ObserveLayers, where the caller has more than one layer at hand.
//
// An operation is used by one thread at a time; many operations run side by side on one backend.
// It holds scores (at most L x Hkv x T floats), never K or V: views are read during the call only.
#ifndef KEEPSET_ENGINE_OPERATION_H_
#define KEEPSET_ENGINE_OPERATION_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_registry.h"
#include "engine/shadow.h"
#include "kernels/compute_backend.h"

namespace keepset::engine {

class Operation {
 public:
  // Checks the whole spec: shapes, budget, scope, parameters, protected ranges, table, signals.
  // InvalidArgument: shape, value, unknown parameter or scope, missing signal.
  // NotFound: unknown policy, or a table is needed and none given. FailedPrecondition: table does
  // not fit. Unavailable: the backend's device failed. `policies`, `backend` and `clock` must
  // outlive the operation.
  static absl::StatusOr<std::unique_ptr<Operation>> Begin(OperationSpec spec,
                                                          const PolicyRegistry& policies,
                                                          kernels::ComputeBackend& backend,
                                                          const Clock& clock);
  virtual ~Operation() = default;

  virtual const OperationSpec& spec() const = 0;

  // Layers come once each, in ascending order from 0; anything else is InvalidArgument naming the
  // layer that was expected. A refused observation leaves the operation as it was, so the caller
  // may repeat it.
  virtual absl::Status Observe(int64_t layer, const LayerObservation& observation) = 0;

  // Observe of each in order, several together where the backend gains by it: same keep sets, same
  // errors. When a layer is refused those before it are observed, and it may be repeated.
  virtual absl::Status ObserveLayers(absl::Span<const ObservedLayer> layers) = 0;

  // How many layers ObserveLayers takes together. A caller that has all of them, and others waiting
  // for its thread, hands over as many at a time: their work is bounded.
  virtual int64_t layers_at_once() const = 0;

  // The keep set of an observed layer when it is final before Finish (layer-local policies), else
  // nullptr. Valid until Finish. An operation that ends kept_full after all (deadline,
  // FinishKeptFull) supersedes what it handed out: only the operation's result is to be applied.
  virtual const LayerResult* EarlyResult(int64_t layer) const = 0;

  // FailedPrecondition when layers are missing. Idempotent: later calls return the same result.
  // When the backend's device failed meanwhile, the outcome is kept_full with the reason
  // device_fault; when it has no memory and OnShortMemory::kKeepFull is asked for, with shed.
  virtual absl::StatusOr<const OperationResult*> Finish() = 0;

  // Rows a destination must hold for `layer`: the largest kept count over its KV heads. After
  // Finish.
  virtual absl::StatusOr<int64_t> GatherRows(int64_t layer) const = 0;

  // Moves the kept rows of K and V, bit for bit. k/v out may have more capacity than rows.
  // FailedPrecondition before Finish and in shadow mode.
  virtual absl::Status Gather(int64_t layer, const kernels::KvView& k, const kernels::KvView& v,
                              const kernels::MutableKvView& out_k,
                              const kernels::MutableKvView& out_v) = 0;

  // With OnShortMemory::kKeepFull: whether the backend had no memory for this operation. When that
  // was in a Gather or in ReserveInPlace, FinishKeptFull(shed) replaces the result, unless rows of
  // a layer have moved in place.
  virtual bool is_short_of_memory() const = 0;

  // Takes what GatherInPlace of any of `layers` needs of the backend's memory, until the operation
  // is destroyed, and refuses what it would refuse. Moves nothing. With OnShortMemory::kKeepFull,
  // FinishKeptFull(shed) replaces the result after ResourceExhausted.
  virtual absl::Status ReserveInPlace(absl::Span<const LayerInPlace> layers) = 0;

  // The same within the worker's own tensors: kept rows move to the front, rows behind them stay.
  // InvalidArgument, FailedPrecondition and ResourceExhausted, which layers of ReserveInPlace do
  // not end with: nothing of the layer has moved. After any other error, DataLoss for one, K and V
  // of the layer may be half moved: the worker's cache is lost.
  virtual absl::Status GatherInPlace(int64_t layer, const kernels::MutableKvView& k,
                                     const kernels::MutableKvView& v) = 0;

  // Gather of several layers: the same rows and errors, together where the backend gains by it. No
  // destination overlaps a source or another destination.
  virtual absl::Status GatherLayers(absl::Span<const LayerGather> layers) = 0;

  // After Finish, once: what spec.shadow_table is asked with. nullptr: there is none, or this
  // operation kept everything without deciding. An error: why that table could not be asked; it
  // never fails another call of this class.
  virtual absl::StatusOr<std::unique_ptr<ShadowDecision>> TakeShadow() = 0;

  // The answer when somebody else decides not to compress (load shedding, a device fault): every
  // position of every layer. Ends the operation. Of a finished operation only device_fault
  // replaces the result, and shed where memory was short; neither when rows have moved in place.
  // Arrays of a replaced result live as long as the operation.
  virtual const OperationResult& FinishKeptFull(Reason reason) = 0;
};

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_OPERATION_H_
