#include "service/rpc/server_service.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "service/metrics/metric_names.h"
#include "service/metrics/operation_totals.h"
#include "service/rpc/wire_status.h"
#include "tables/table_store.h"

namespace keepset::service {
namespace {

constexpr absl::Duration kMaxDrainWait = absl::Minutes(10);
// How long a drain waits before the next one gets the thread.
constexpr absl::Duration kDrainTurn = absl::Milliseconds(5);

void EncodeTotal(const OperationTotal& total, v1::OperationStatistics& wire) {
  wire.set_model(total.model);
  wire.set_policy(total.policy);
  if (total.table.has_value()) {
    wire.mutable_table()->set_name(total.table->name);
    wire.mutable_table()->set_version(total.table->version);
    wire.mutable_table()->set_digest(total.table->digest);
  }
  for (const auto& [key, count] : total.outcomes) {
    v1::OutcomeStatistics* const outcome = wire.add_outcomes();
    outcome->set_outcome(key.first);
    outcome->set_reason(key.second);
    outcome->set_count(count);
  }
  for (int i = 0; i < kNumStages; ++i) {
    const OperationTotal::StageTotal& of_stage = total.stages[i];
    if (of_stage.count == 0) continue;
    v1::StageStatistics* const stage = wire.add_stages();
    stage->set_stage(std::string(kStageValues[i]));
    stage->set_count(of_stage.count);
    stage->set_total_seconds(absl::ToDoubleSeconds(of_stage.time));
    stage->set_longest_seconds(absl::ToDoubleSeconds(of_stage.longest));
  }
  wire.set_input_tokens(total.input_tokens);
  wire.set_kept_tokens(total.kept_tokens);
  wire.set_bytes_before(total.bytes_before);
  wire.set_bytes_after(total.bytes_after);
}

class ServerServiceImpl final : public v1::ServerService::CallbackService {
 public:
  ServerServiceImpl(ServerServiceOptions options, const ServiceContext& context,
                    WorkQueue& blocking)
      : options_(std::move(options)),
        context_(context),
        start_(context.clock.Monotonic()),
        blocking_(blocking) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* call,
                                          const v1::GetServerInfoRequest* /*request*/,
                                          v1::GetServerInfoResponse* response) override {
    *response = options_.info;
    const std::shared_ptr<const tables::TableSnapshot> snapshot = context_.tables.Snapshot();
    for (const auto& table : snapshot->tables) {
      v1::TableIdentity* identity = response->add_tables();
      identity->set_name(table->identity().name);
      identity->set_version(table->identity().version);
      identity->set_digest(table->identity().digest);
      identity->set_source(std::string(table->provenance_source()));
    }
    response->set_draining(context_.admission.draining());
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  grpc::ServerUnaryReactor* GetStatistics(grpc::CallbackServerContext* call,
                                          const v1::GetStatisticsRequest* request,
                                          v1::GetStatisticsResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    reactor->Finish(ToGrpcStatus(FillStatistics(request->session_id(), *response)));
    return reactor;
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* call,
                                  const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    if (options_.admin != AdminAccess::kAllowed) {
      reactor->Finish({grpc::StatusCode::PERMISSION_DENIED,
                       "Drain is switched off, want a server started with enable_admin"});
      return reactor;
    }
    options_.start_draining();
    const absl::Duration end = context_.clock.Monotonic() +
                               std::min(absl::Milliseconds(request->timeout_ms()), kMaxDrainWait);
    const absl::Status queued = blocking_.Submit(
        [this, call, end, response, reactor] { AwaitIdle(*call, end, response, reactor); });
    if (!queued.ok()) reactor->Finish(ToGrpcStatus(queued));
    return reactor;
  }

 private:
  // Waits a little and then goes to the end of the line: a drain that takes its time holds up
  // nobody else's work.
  void AwaitIdle(grpc::CallbackServerContext& call, absl::Duration end, v1::DrainResponse* response,
                 grpc::ServerUnaryReactor* reactor) {
    const absl::Duration left = std::max(absl::ZeroDuration(), end - context_.clock.Monotonic());
    if (context_.admission.WaitIdle(std::min(left, kDrainTurn)) || left <= kDrainTurn) {
      response->set_operations_left(static_cast<uint32_t>(context_.admission.running()));
      reactor->Finish(grpc::Status::OK);
    } else if (call.IsCancelled()) {
      reactor->Finish(
          {grpc::StatusCode::CANCELLED, "the client waits no longer, the server goes on draining"});
    } else {
      blocking_.Continue(
          [this, &call, end, response, reactor] { AwaitIdle(call, end, response, reactor); });
    }
  }

  absl::Status FillStatistics(absl::string_view session_id,
                              v1::GetStatisticsResponse& response) const {
    std::vector<OperationTotal> totals;
    if (session_id.empty()) {
      totals = context_.totals.All();
    } else {
      KEEPSET_ASSIGN_OR_RETURN(totals, context_.totals.OfSession(session_id));
    }
    for (const OperationTotal& total : totals) EncodeTotal(total, *response.add_operations());
    response.set_uptime_seconds(absl::ToDoubleSeconds(context_.clock.Monotonic() - start_));
    response.set_operations_running(static_cast<uint32_t>(context_.admission.running()));
    response.set_queue_waiting(static_cast<uint32_t>(context_.queue.waiting()));
    response.set_sessions(static_cast<uint32_t>(context_.sessions.Counts().sessions));
    return absl::OkStatus();
  }

  const ServerServiceOptions options_;
  const ServiceContext context_;
  const absl::Duration start_;  // monotonic
  WorkQueue& blocking_;
};

}  // namespace

std::unique_ptr<v1::ServerService::CallbackService> NewServerService(ServerServiceOptions options,
                                                                     const ServiceContext& context,
                                                                     WorkQueue& blocking) {
  return std::make_unique<ServerServiceImpl>(std::move(options), context, blocking);
}

}  // namespace keepset::service
