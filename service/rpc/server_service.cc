#include "service/rpc/server_service.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "service/rpc/wire_status.h"

namespace keepset::service {
namespace {

constexpr absl::Duration kMaxDrainWait = absl::Minutes(10);

class ServerServiceImpl final : public v1::ServerService::CallbackService {
 public:
  ServerServiceImpl(ServerServiceOptions options, const tables::TableStore& tables,
                    Admission& admission, WorkQueue& blocking)
      : options_(std::move(options)), tables_(tables), admission_(admission), blocking_(blocking) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* call,
                                          const v1::GetServerInfoRequest* /*request*/,
                                          v1::GetServerInfoResponse* response) override {
    *response = options_.info;
    const std::shared_ptr<const tables::TableSnapshot> snapshot = tables_.Snapshot();
    for (const auto& table : snapshot->tables) {
      v1::TableIdentity* identity = response->add_tables();
      identity->set_name(table->identity().name);
      identity->set_version(table->identity().version);
      identity->set_digest(table->identity().digest);
      identity->set_source(std::string(table->provenance_source()));
    }
    response->set_draining(admission_.draining());
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
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
    const absl::Duration timeout =
        std::min(absl::Milliseconds(request->timeout_ms()), kMaxDrainWait);
    const absl::Status queued = blocking_.Submit([this, reactor, response, timeout] {
      admission_.WaitIdle(timeout);
      response->set_operations_left(static_cast<uint32_t>(admission_.running()));
      reactor->Finish(grpc::Status::OK);
    });
    if (!queued.ok()) reactor->Finish(ToGrpcStatus(queued));
    return reactor;
  }

 private:
  const ServerServiceOptions options_;
  const tables::TableStore& tables_;
  Admission& admission_;
  WorkQueue& blocking_;
};

}  // namespace

std::unique_ptr<v1::ServerService::CallbackService> NewServerService(
    ServerServiceOptions options, const tables::TableStore& tables, Admission& admission,
    WorkQueue& blocking) {
  return std::make_unique<ServerServiceImpl>(std::move(options), tables, admission, blocking);
}

}  // namespace keepset::service
