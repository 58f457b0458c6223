#include "service/rpc/session_service.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "service/rpc/lease_stream_reactor.h"
#include "service/rpc/wire_status.h"

namespace keepset::service {
namespace {

// A peer's text in our log.
constexpr size_t kMaxLoggedError = 2048;
// How long a retire waits before the next one gets the thread.
constexpr absl::Duration kRetireTurn = absl::Milliseconds(5);

absl::StatusOr<RegionAccess> DecodeAccess(v1::RegionAccess wire) {
  switch (wire) {
    case v1::REGION_ACCESS_READ_ONLY:
      return RegionAccess::kReadOnly;
    case v1::REGION_ACCESS_READ_WRITE:
      return RegionAccess::kReadWrite;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("access=", static_cast<int>(wire),
                       ", want REGION_ACCESS_READ_ONLY or REGION_ACCESS_READ_WRITE"));
  }
}

void EncodeRegion(const RegionInfo& info, v1::Region* wire) {
  wire->set_region_id(info.region_id);
  wire->set_name(info.name);
  wire->set_kind(info.kind);
  wire->set_length(info.length);
  wire->set_access(info.access == RegionAccess::kReadWrite ? v1::REGION_ACCESS_READ_WRITE
                                                           : v1::REGION_ACCESS_READ_ONLY);
  wire->set_generation(info.generation);
  wire->set_retiring(info.retiring);
  wire->set_leases(static_cast<uint32_t>(info.leases));
}

uint32_t WholeSeconds(absl::Duration time) {
  return static_cast<uint32_t>(std::max<int64_t>(1, absl::ToInt64Seconds(time)));
}

class SessionServiceImpl final : public SessionService {
 public:
  SessionServiceImpl(const ServiceContext& context, SessionServiceOptions options,
                     WorkQueue& registration, WorkQueue& retirement)
      : context_(context),
        options_(std::move(options)),
        registration_(registration),
        retirement_(retirement) {}

  grpc::ServerUnaryReactor* OpenSession(grpc::CallbackServerContext* call,
                                        const v1::OpenSessionRequest* request,
                                        v1::OpenSessionResponse* response) override {
    return RunOn(registration_, call, "OpenSession",
                 [this, request, response] { return Open(*request, response); });
  }

  grpc::ServerUnaryReactor* CloseSession(grpc::CallbackServerContext* call,
                                         const v1::CloseSessionRequest* request,
                                         v1::CloseSessionResponse* /*response*/) override {
    return RunOn(retirement_, call, "CloseSession",
                 [this, request] { return context_.sessions.CloseSession(request->session_id()); });
  }

  grpc::ServerUnaryReactor* RegisterRegion(grpc::CallbackServerContext* call,
                                           const v1::RegisterRegionRequest* request,
                                           v1::RegisterRegionResponse* response) override {
    return RunOn(registration_, call, "RegisterRegion",
                 [this, call, request, response] { return Register(*call, *request, response); });
  }

  grpc::ServerUnaryReactor* AllocateRegion(grpc::CallbackServerContext* call,
                                           const v1::AllocateRegionRequest* request,
                                           v1::AllocateRegionResponse* response) override {
    return RunOn(registration_, call, "AllocateRegion",
                 [this, call, request, response] { return Allocate(*call, *request, response); });
  }

  grpc::ServerUnaryReactor* RetireRegion(grpc::CallbackServerContext* call,
                                         const v1::RetireRegionRequest* request,
                                         v1::RetireRegionResponse* /*response*/) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    const absl::Duration timeout = request->timeout_ms() == 0
                                       ? options_.default_retire_timeout
                                       : absl::Milliseconds(request->timeout_ms());
    const absl::Duration end =
        context_.clock.Monotonic() + std::min(timeout, options_.max_retire_timeout);
    const absl::Status queued = retirement_.Submit(
        [this, call, request, end, reactor] { Retire(*call, *request, end, reactor); });
    if (!queued.ok()) Answer("RetireRegion", queued, reactor);
    return reactor;
  }

  grpc::ServerUnaryReactor* ListRegions(grpc::CallbackServerContext* call,
                                        const v1::ListRegionsRequest* request,
                                        v1::ListRegionsResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    const auto regions = context_.sessions.ListRegions(request->session_id());
    if (regions.ok()) {
      for (const RegionInfo& region : *regions) EncodeRegion(region, response->add_regions());
    }
    Answer("ListRegions", regions.status(), reactor);
    return reactor;
  }

  grpc::ServerBidiReactor<v1::LeaseBeat, v1::LeaseNotice>* Lease(
      grpc::CallbackServerContext* /*call*/) override {
    return StartLeaseStream(
        context_.sessions, [this](const std::string& id) { return NoticeFor(id); }, streams_);
  }

  void Forget(absl::string_view session_id) override {
    absl::MutexLock lock(&mutex_);
    lease_seconds_.erase(session_id);
  }

  void NotifyDraining() override { streams_.NotifyAll(); }
  void CloseStreams() override { streams_.CloseAll(); }

 private:
  absl::Status Open(const v1::OpenSessionRequest& request, v1::OpenSessionResponse* response) {
    if (context_.admission.draining()) {
      return absl::UnavailableError("the server is draining, use another one");
    }
    KEEPSET_RETURN_IF_ERROR(CheckPin(request.table()));
    OpenSessionArgs args;
    args.client_uuid = request.client_uuid();
    args.engine = request.engine();
    args.tenant = request.tenant();
    args.pid_hint = request.pid_hint();
    args.lease = absl::Seconds(request.lease_seconds());
    KEEPSET_ASSIGN_OR_RETURN(const SessionInfo info, context_.sessions.OpenSession(args));
    response->set_session_id(info.session_id);
    response->set_session_generation(info.generation);
    response->set_lease_seconds(WholeSeconds(info.lease));
    // Two beats may be lost before the lease runs out.
    response->set_heartbeat_seconds(WholeSeconds(info.lease / 3));
    response->set_side_socket_path(options_.side_socket_path);
    if (!options_.side_socket_path.empty()) {
      response->set_side_socket_token(info.token.data(), info.token.size());
    }
    {
      absl::MutexLock lock(&mutex_);
      lease_seconds_[info.session_id] = response->lease_seconds();
    }
    if (request.has_table()) context_.session_pins.Set(info.session_id, request.table());
    if (!args.tenant.empty()) context_.session_tenants.Set(info.session_id, args.tenant);
    context_.totals.OpenSession(info.session_id);
    // One that was replaced meanwhile must not leave its entries behind.
    if (!context_.sessions.CheckSession(info.session_id).ok()) {
      Forget(info.session_id);
      context_.session_pins.Forget(info.session_id);
      context_.session_tenants.Forget(info.session_id);
      context_.totals.ForgetSession(info.session_id);
    }
    return absl::OkStatus();
  }

  // A pin that no table answers is better known now than with the first operation. Whether the
  // table fits is known with the first model.
  absl::Status CheckPin(const v1::TablePin& pin) const {
    tables::TableQuery query;
    ApplyPin(pin, query);
    if (query.name.empty() && !query.pins()) return absl::OkStatus();
    return tables::CheckTableExists(*context_.tables.Snapshot(), query);
  }

  absl::Status Register(const grpc::CallbackServerContext& call,
                        const v1::RegisterRegionRequest& request,
                        v1::RegisterRegionResponse* response) {
    RegionDescriptor descriptor;
    descriptor.kind = request.kind();
    descriptor.name = request.posix_name();
    descriptor.ipc_handle = request.ipc_handle();
    descriptor.allocation_bytes = request.allocation_bytes();
    descriptor.offset = request.offset();
    descriptor.length = request.length();
    descriptor.device_uuid = request.device_uuid();
    descriptor.generation = request.generation();
    KEEPSET_ASSIGN_OR_RETURN(descriptor.access, DecodeAccess(request.access()));
    KEEPSET_ASSIGN_OR_RETURN(const RegionInfo info, context_.sessions.RegisterRegion(
                                                        request.session_id(), request.name(),
                                                        request.fd_token(), std::move(descriptor)));
    if (call.IsCancelled()) return GiveBack(request.session_id(), info.region_id);
    response->set_region_id(info.region_id);
    response->set_path(info.kind);
    response->set_mapped_bytes(info.length);
    return absl::OkStatus();
  }

  // Nobody has heard of the region, so nobody would retire it.
  absl::Status GiveBack(const std::string& session_id, const std::string& region_id) {
    static_cast<void>(context_.sessions.RetireRegion(session_id, region_id, absl::ZeroDuration()));
    return absl::CancelledError("the client waits no longer, the region is given back");
  }

  absl::Status Allocate(const grpc::CallbackServerContext& call,
                        const v1::AllocateRegionRequest& request,
                        v1::AllocateRegionResponse* response) {
    KEEPSET_ASSIGN_OR_RETURN(
        const AllocatedRegion region,
        context_.sessions.AllocateRegion(request.session_id(), request.name(), request.kind(),
                                         request.length(), request.device_uuid()));
    if (call.IsCancelled()) return GiveBack(request.session_id(), region.info.region_id);
    response->set_region_id(region.info.region_id);
    response->set_generation(region.info.generation);
    response->set_allocation_bytes(region.info.owned_bytes);
    response->set_offset(region.offset);
    if (region.fd_token != 0) {
      response->set_fd_token(region.fd_token);
    } else {
      response->set_ipc_handle(region.ipc_handle);
    }
    return absl::OkStatus();
  }

  // Waits a little and then goes to the end of the line: retires of regions that stay in use hold
  // up nobody else's.
  void Retire(grpc::CallbackServerContext& call, const v1::RetireRegionRequest& request,
              absl::Duration end, grpc::ServerUnaryReactor* reactor) {
    const absl::Duration left = std::max(absl::ZeroDuration(), end - context_.clock.Monotonic());
    const absl::Status status = context_.sessions.RetireRegion(
        request.session_id(), request.region_id(), std::min(left, kRetireTurn));
    if (!absl::IsDeadlineExceeded(status) || left <= kRetireTurn) {
      Answer("RetireRegion", status, reactor);
    } else if (call.IsCancelled()) {
      Answer("RetireRegion",
             absl::CancelledError("the client waits no longer, the region stays retiring"),
             reactor);
    } else {
      retirement_.Continue(
          [this, &call, &request, end, reactor] { Retire(call, request, end, reactor); });
    }
  }

  v1::LeaseNotice NoticeFor(const std::string& session_id) const {
    v1::LeaseNotice notice;
    notice.set_draining(context_.admission.draining());
    absl::MutexLock lock(&mutex_);
    const auto it = lease_seconds_.find(session_id);
    if (it != lease_seconds_.end()) notice.set_lease_seconds(it->second);
    return notice;
  }

  template <typename Fn>
  grpc::ServerUnaryReactor* RunOn(WorkQueue& queue, grpc::CallbackServerContext* call,
                                  absl::string_view method, Fn fn) {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    const absl::Status queued =
        queue.Submit([this, method, reactor, fn] { Answer(method, fn(), reactor); });
    if (!queued.ok()) Answer(method, queued, reactor);
    return reactor;
  }

  void Answer(absl::string_view method, const absl::Status& status,
              grpc::ServerUnaryReactor* reactor) {
    const std::string correlation_id = context_.correlation_ids.Next();
    reactor->Finish(ToGrpcStatus(PublicStatus(status, correlation_id)));
    LogFields fields = {{"method", std::string(method)},
                        {"code", absl::StatusCodeToString(status.code())},
                        {"correlation_id", correlation_id}};
    if (!status.ok()) fields.emplace_back("error", ToText(status.message(), kMaxLoggedError));
    context_.log.Write(absl::IsInternal(status) ? LogSeverity::kError : LogSeverity::kInfo, "call",
                       fields);
  }

  const ServiceContext context_;
  const SessionServiceOptions options_;
  WorkQueue& registration_;
  WorkQueue& retirement_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, uint32_t> lease_seconds_ ABSL_GUARDED_BY(mutex_);
  OpenLeaseStreams streams_;
};

}  // namespace

std::unique_ptr<SessionService> SessionService::New(const ServiceContext& context,
                                                    SessionServiceOptions options,
                                                    WorkQueue& registration,
                                                    WorkQueue& retirement) {
  return std::make_unique<SessionServiceImpl>(context, std::move(options), registration,
                                              retirement);
}

}  // namespace keepset::service
