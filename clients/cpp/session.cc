#include "clients/cpp/session.h"

#include <unistd.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cpp/rpc_status.h"

namespace keepset::client {
namespace {

// A goodbye that does not go through costs nothing: the hang-up ends the session as well.
constexpr absl::Duration kCloseTimeout = absl::Seconds(2);

absl::Status Retire(v1::SessionService::Stub* stub, const v1::RetireRegionRequest& request,
                    absl::Duration timeout) {
  v1::RetireRegionResponse response;
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  return FromRpcStatus(stub->RetireRegion(&context, request, &response));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Session>> Session::Open(v1::SessionService::Stub* stub,
                                                       const ClientOptions& options,
                                                       const std::string& client_uuid) {
  v1::OpenSessionRequest request;
  request.set_client_uuid(client_uuid);
  request.set_engine(options.engine);
  request.set_tenant(options.tenant);
  request.set_pid_hint(getpid());
  request.set_lease_seconds(absl::ToInt64Seconds(options.lease));
  v1::OpenSessionResponse response;
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options.connect_timeout));
  // A channel that has just lost its server would fail at once until its next attempt.
  context.set_wait_for_ready(true);
  KEEPSET_RETURN_IF_ERROR(FromRpcStatus(stub->OpenSession(&context, request, &response)));
  if (response.side_socket_path().empty()) {
    grpc::ClientContext close_context;
    close_context.set_deadline(absl::ToChronoTime(absl::Now() + kCloseTimeout));
    v1::CloseSessionRequest close_request;
    close_request.set_session_id(response.session_id());
    v1::CloseSessionResponse closed;
    (void)stub->CloseSession(&close_context, close_request, &closed);
    return absl::FailedPreconditionError("the server has no side socket to pass memory over");
  }
  std::unique_ptr<Session> session(new Session(stub, options));
  session->id_ = response.session_id();
  KEEPSET_ASSIGN_OR_RETURN(session->side_socket_, SideSocket::Connect(response.side_socket_path(),
                                                                      response.side_socket_token(),
                                                                      options.connect_timeout));
  session->lease_ = std::make_unique<LeaseKeeper>(
      stub, session->id_, absl::Seconds(std::max<int64_t>(1, response.heartbeat_seconds())));
  return session;
}

Session::~Session() {
  lease_.reset();
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + kCloseTimeout));
  v1::CloseSessionRequest request;
  request.set_session_id(id_);
  v1::CloseSessionResponse response;
  (void)stub_->CloseSession(&context, request, &response);
}

absl::Status Session::RegisterRegion(const SharedRegion& region, const std::string& name,
                                     RegionAccess access) {
  KEEPSET_ASSIGN_OR_RETURN(const uint64_t fd_token, side_socket_->PassFd(region.fd()));
  v1::RegisterRegionRequest request;
  request.set_kind("memfd");
  request.set_fd_token(fd_token);
  request.set_allocation_bytes(region.size_bytes());
  request.set_length(region.size_bytes());
  return Register(std::move(request), name, {&region, access, ""});
}

absl::Status Session::RegisterRegion(const DeviceRegion& region, const std::string& name,
                                     RegionAccess access) {
  v1::RegisterRegionRequest request;
  request.set_kind(region.kind());
  if (region.fd() >= 0) {
    KEEPSET_ASSIGN_OR_RETURN(const uint64_t fd_token, side_socket_->PassFd(region.fd()));
    request.set_fd_token(fd_token);
  } else {
    request.set_ipc_handle(region.ipc_handle());
  }
  request.set_allocation_bytes(region.allocation_bytes());
  request.set_offset(region.offset());
  request.set_length(region.size_bytes());
  request.set_device_uuid(region.device_uuid());
  request.set_generation(region.generation());
  return Register(std::move(request), name, {&region, access, ""});
}

absl::Status Session::Register(v1::RegisterRegionRequest request, const std::string& name,
                               Region region) {
  request.set_session_id(id_);
  request.set_name(name);
  request.set_access(region.access == RegionAccess::kReadWrite ? v1::REGION_ACCESS_READ_WRITE
                                                               : v1::REGION_ACCESS_READ_ONLY);
  v1::RegisterRegionResponse response;
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + call_timeout_));
  KEEPSET_RETURN_IF_ERROR(FromRpcStatus(stub_->RegisterRegion(&context, request, &response)));
  region.region_id = response.region_id();
  absl::MutexLock lock(&mutex_);
  regions_[name] = std::move(region);
  return absl::OkStatus();
}

absl::Status Session::RetireRegion(const std::string& name) {
  v1::RetireRegionRequest request;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = regions_.find(name);
    if (found == regions_.end()) {
      return absl::NotFoundError(absl::StrCat("region \"", name, "\" is not registered"));
    }
    if (std::holds_alternative<const ServiceRegion*>(found->second.memory)) {
      return absl::FailedPreconditionError(
          absl::StrCat("region \"", name, "\" is the server's, want ServiceRegion::Retire"));
    }
    request.set_region_id(found->second.region_id);
    found->second.is_retiring = true;
  }
  request.set_session_id(id_);
  absl::Status retired = Retire(stub_, request, call_timeout_);
  if (retired.ok() || absl::IsNotFound(retired)) Forget(name, request.region_id());
  return retired;
}

absl::StatusOr<std::unique_ptr<ServiceMapping>> Session::Map(
    const ServiceMemory& memory, const v1::AllocateRegionResponse& response) {
  MappingSource source;
  source.kind = memory.kind;
  source.ipc_handle = response.ipc_handle();
  source.allocation_bytes = response.allocation_bytes();
  source.device_uuid = memory.device_uuid;
  source.library = memory.library;
  if (response.descriptor_case() == v1::AllocateRegionResponse::kFdToken) {
    KEEPSET_ASSIGN_OR_RETURN(source.fd, side_socket_->FetchFd(response.fd_token()));
  }
  const absl::Cleanup close_fd = [&] {
    if (source.fd >= 0) ::close(source.fd);
  };
  return ServiceMapping::Open(source);
}

absl::StatusOr<std::unique_ptr<ServiceRegion>> Session::AllocateRegion(
    const std::string& name, const ServiceMemory& memory) {
  if (memory.size_bytes < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("region \"", name, "\": size_bytes=", memory.size_bytes, ", want 1 or more"));
  }
  v1::AllocateRegionRequest request;
  request.set_session_id(id_);
  request.set_name(name);
  request.set_kind(memory.kind);
  request.set_length(static_cast<uint64_t>(memory.size_bytes));
  request.set_device_uuid(memory.device_uuid);
  v1::AllocateRegionResponse response;
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + call_timeout_));
  KEEPSET_RETURN_IF_ERROR(FromRpcStatus(stub_->AllocateRegion(&context, request, &response)));
  const std::string region_id = response.region_id();
  v1::RetireRegionRequest retire;
  retire.set_session_id(id_);
  retire.set_region_id(region_id);
  // Also for a session that is gone: the server may have kept the memory for this word.
  auto tell_server = [stub = stub_, retire, timeout = call_timeout_] {
    return Retire(stub, retire, timeout);
  };
  absl::StatusOr<std::unique_ptr<ServiceMapping>> mapping = Map(memory, response);
  if (!mapping.ok()) {
    static_cast<void>(tell_server());
    return mapping.status();
  }
  std::unique_ptr<ServiceRegion> region(new ServiceRegion(
      name, memory, static_cast<int64_t>(response.offset()), *std::move(mapping),
      [session = weak_from_this(), name, region_id] {
        if (const auto alive = session.lock()) alive->Forget(name, region_id);
      },
      std::move(tell_server)));
  {
    absl::MutexLock lock(&mutex_);
    if (!is_replaced_) {
      regions_[name] = {region.get(), RegionAccess::kReadWrite, region_id};
      return region;
    }
  }
  return absl::FailedPreconditionError(
      absl::StrCat("region \"", name, "\": the session was opened again meanwhile, allocate anew"));
}

void Session::Forget(const std::string& name, const std::string& region_id) {
  absl::MutexLock lock(&mutex_);
  const auto found = regions_.find(name);
  if (found != regions_.end() && found->second.region_id == region_id) regions_.erase(found);
}

absl::Status Session::AdoptRegions(Session& other) {
  std::map<std::string, Region> regions;
  {
    absl::MutexLock lock(&other.mutex_);
    other.is_replaced_ = true;
    regions = other.regions_;
    std::erase_if(regions, [](const auto& entry) { return entry.second.is_retiring; });
    for (const auto& [name, region] : regions) {
      const auto* const owned = std::get_if<const ServiceRegion*>(&region.memory);
      if (owned != nullptr) (*owned)->NoteLost();
    }
  }
  for (const auto& [name, region] : regions) {
    KEEPSET_RETURN_IF_ERROR(std::visit(
        [&, &name = name, access = region.access](const auto* memory) {
          if constexpr (std::is_same_v<decltype(memory), const ServiceRegion*>) {
            return absl::OkStatus();
          } else {
            return RegisterRegion(*memory, name, access);
          }
        },
        region.memory));
  }
  return absl::OkStatus();
}

bool Session::Resolve(const void* data, int64_t size_bytes, v1::RegionSlice* slice) const {
  absl::MutexLock lock(&mutex_);
  for (const auto& [name, region] : regions_) {
    if (region.is_retiring) continue;
    const auto offset = std::visit(
        [&](const auto* memory) {
          return memory->Contains(data, size_bytes)
                     ? static_cast<const std::byte*>(data) - memory->data()
                     : ptrdiff_t{-1};
        },
        region.memory);
    if (offset < 0) continue;
    slice->set_region_id(region.region_id);
    slice->set_offset(static_cast<uint64_t>(offset));
    slice->set_length(size_bytes);
    return true;
  }
  return false;
}

}  // namespace keepset::client
