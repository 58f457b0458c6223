// What the rpc room works with, wired by the server. Everything outlives the services.
#ifndef KEEPSET_SERVICE_RPC_SERVICE_CONTEXT_H_
#define KEEPSET_SERVICE_RPC_SERVICE_CONTEXT_H_

#include <cstdint>
#include <string>

#include "base/clock.h"
#include "base/log.h"
#include "engine/policies/policy_registry.h"
#include "kernels/compute_backend.h"
#include "service/memory/session_manager.h"
#include "service/metrics/metrics.h"
#include "service/metrics/operation_totals.h"
#include "service/rpc/admission.h"
#include "service/rpc/correlation_ids.h"
#include "service/rpc/fence_table.h"
#include "service/rpc/per_session.h"
#include "service/rpc/request_codec.h"
#include "service/rpc/shadow_choice.h"
#include "service/rpc/shadow_runner.h"
#include "service/rpc/work_queue.h"
#include "tables/table_store.h"

namespace keepset::service {

// What happens to an operation that finds the queue full.
enum class OverloadAnswer {
  kRefuse,      // RESOURCE_EXHAUSTED with a retry hint
  kShedToFull,  // outcome kept_full, reason shed
};

struct ServiceContext {
  const engine::PolicyRegistry& policies;
  kernels::ComputeBackend& backend;
  const tables::TableStore& tables;
  SessionManager& sessions;
  Metrics& metrics;
  Logger& log;
  const Clock& clock;
  Admission& admission;
  FenceTable& fences;
  SessionPins& session_pins;
  SessionTenants& session_tenants;
  OperationTotals& totals;
  WorkQueue& queue;
  CorrelationIds& correlation_ids;
  ShadowRunner& shadows;
  ShadowOptions shadow;
  CodecLimits codec;
  int64_t stream_credits = 64;  // layer inputs in flight per stream
  // Operations a stream may have begun and not ended.
  int64_t max_open_per_stream = 256;
  OverloadAnswer overload = OverloadAnswer::kRefuse;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_SERVICE_CONTEXT_H_
