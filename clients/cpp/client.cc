#include "clients/cpp/client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <random>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "clients/cpp/channel.h"
#include "clients/cpp/compress_stream.h"
#include "clients/cpp/rpc_status.h"
#include "clients/cpp/server_info_codec.h"
#include "clients/cpp/session.h"
#include "clients/cpp/wire_codec.h"
#include "keepset/v1/compression.grpc.pb.h"
#include "keepset/v1/server.grpc.pb.h"
#include "keepset/v1/session.grpc.pb.h"

namespace keepset::client {
namespace {

std::string RandomUuid() {
  std::random_device device;
  std::string uuid(16, '\0');
  for (char& byte : uuid) byte = static_cast<char>(device());
  return uuid;
}

class GrpcClient final : public Client {
 public:
  GrpcClient(const ClientOptions& options, std::shared_ptr<grpc::Channel> channel)
      : options_(options),
        client_uuid_(options.client_uuid.has_value()
                         ? std::string(options.client_uuid->begin(), options.client_uuid->end())
                         : RandomUuid()),
        channel_(std::move(channel)),
        compression_(v1::CompressionService::NewStub(channel_)),
        sessions_(v1::SessionService::NewStub(channel_)),
        server_(v1::ServerService::NewStub(channel_)) {}

  absl::Status Open() {
    absl::StatusOr<ServerInfo> info = FetchInfo(options_.connect_timeout);
    if (!info.ok()) return Unreachable(info.status());
    max_inline_bytes_ = info->limits.max_inline_bytes;
    const absl::Status can_share = CanShareMemory(*info);
    if (options_.transport == Transport::kMemfd) KEEPSET_RETURN_IF_ERROR(can_share);
    if (options_.transport == Transport::kInline || !can_share.ok()) {
      reason_ =
          options_.transport == Transport::kInline ? "asked for" : std::string(can_share.message());
      return absl::OkStatus();
    }
    absl::StatusOr<std::unique_ptr<Session>> session =
        Session::Open(sessions_.get(), options_, client_uuid_);
    absl::MutexLock lock(&mutex_);
    if (session.ok()) {
      session_ = *std::move(session);
      transport_ = Transport::kMemfd;
      reason_ = options_.transport == Transport::kMemfd ? "asked for" : "server on this machine";
      return absl::OkStatus();
    }
    if (options_.transport == Transport::kMemfd) return session.status();
    reason_ = std::string(session.status().message());
    return absl::OkStatus();
  }

  Transport transport() const override { return transport_; }
  std::string transport_reason() const override { return reason_; }

  absl::StatusOr<ServerInfo> GetServerInfo() override {
    absl::StatusOr<ServerInfo> info = FetchInfo(options_.call_timeout);
    if (!info.ok()) return Unreachable(info.status());
    return info;
  }

  absl::StatusOr<ServerStatistics> GetStatistics(StatisticsOf whose) override {
    v1::GetStatisticsRequest request;
    if (whose == StatisticsOf::kSession) {
      const std::shared_ptr<Session> session = CurrentSession();
      if (session == nullptr) {
        return absl::FailedPreconditionError(
            absl::StrCat("statistics of a session: this client has none (", reason_, ")"));
      }
      request.set_session_id(session->id());
    }
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + options_.call_timeout));
    v1::GetStatisticsResponse response;
    const absl::Status asked = FromRpcStatus(server_->GetStatistics(&context, request, &response));
    if (!asked.ok()) return Unreachable(asked);
    return DecodeStatistics(response);
  }

  absl::Status RegisterRegion(const SharedRegion& region, const std::string& name,
                              RegionAccess access) override {
    const std::shared_ptr<Session> session = CurrentSession();
    if (session == nullptr) return absl::OkStatus();
    return session->RegisterRegion(region, name, access);
  }

  absl::Status RegisterRegion(const DeviceRegion& region, const std::string& name,
                              RegionAccess access) override {
    const std::shared_ptr<Session> session = CurrentSession();
    if (session == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("region \"", name, "\": device memory cannot travel inline (", reason_,
                       "), want a Unix socket and transport memfd"));
    }
    return session->RegisterRegion(region, name, access);
  }

  absl::StatusOr<std::unique_ptr<ServiceRegion>> AllocateRegion(
      const std::string& name, const ServiceMemory& memory) override {
    const std::shared_ptr<Session> session = CurrentSession();
    if (session == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("region \"", name, "\": the server's memory cannot travel inline (", reason_,
                       "), want a Unix socket and transport memfd"));
    }
    return session->AllocateRegion(name, memory);
  }

  absl::Status RetireRegion(const std::string& name) override {
    const std::shared_ptr<Session> session = CurrentSession();
    if (session == nullptr) return absl::OkStatus();
    return session->RetireRegion(name);
  }

  absl::StatusOr<OperationResult> CompressUnary(const OperationSpec& spec,
                                                absl::Span<const LayerInput> layers) override {
    const std::shared_ptr<Session> session = CurrentSession();
    v1::CompressRequest request;
    EncodeSpec(spec, request.mutable_spec());
    if (session != nullptr) request.mutable_spec()->set_session_id(session->id());
    ReplyContext reply_context = MakeReplyContext(spec);
    for (const LayerInput& layer : layers) {
      KEEPSET_RETURN_IF_ERROR(
          EncodeLayer(layer, Resolver(session), placement(), request.add_layers()));
      NoteDestination(layer, reply_context);
    }
    KEEPSET_RETURN_IF_ERROR(CheckSize(request.ByteSizeLong()));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + options_.call_timeout));
    v1::CompressResponse response;
    const grpc::Status status = compression_->Compress(&context, request, &response);
    if (!status.ok()) return Unreachable(FromRpcStatus(status));
    return DecodeResult(*response.mutable_result(), reply_context);
  }

  absl::StatusOr<InputNeeds> GetRequirements(const OperationSpec& spec) override {
    v1::GetRequirementsRequest request;
    EncodeSpec(spec, request.mutable_spec());
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + options_.call_timeout));
    v1::GetRequirementsResponse response;
    const grpc::Status status = compression_->GetRequirements(&context, request, &response);
    if (!status.ok()) return Unreachable(FromRpcStatus(status));
    return DecodeNeeds(response);
  }

  absl::StatusOr<std::unique_ptr<CompressStream>> OpenStream() override {
    const std::shared_ptr<Session> session = CurrentSession();
    return NewCompressStream(compression_.get(), session == nullptr ? "" : session->id(),
                             Resolver(session), placement(), options_.call_timeout);
  }

  absl::Status SessionStatus() const override {
    absl::MutexLock lock(&mutex_);
    return session_ == nullptr ? absl::OkStatus() : session_->status();
  }

  bool draining() const override {
    const std::shared_ptr<Session> session = CurrentSession();
    return session != nullptr && session->draining();
  }

  absl::Status Reopen() override {
    if (transport_ == Transport::kInline) return absl::OkStatus();
    const std::shared_ptr<Session> old = CurrentSession();
    absl::StatusOr<std::unique_ptr<Session>> session =
        Session::Open(sessions_.get(), options_, client_uuid_);
    if (!session.ok()) return Unreachable(session.status());
    if (old != nullptr) KEEPSET_RETURN_IF_ERROR((*session)->AdoptRegions(*old));
    absl::MutexLock lock(&mutex_);
    session_ = *std::move(session);
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<ServerInfo> FetchInfo(absl::Duration timeout) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    v1::GetServerInfoResponse response;
    KEEPSET_RETURN_IF_ERROR(
        FromRpcStatus(server_->GetServerInfo(&context, v1::GetServerInfoRequest(), &response)));
    return DecodeServerInfo(response);
  }

  // gRPC's own words for a dead address name resolver internals; the address is what helps.
  absl::Status Unreachable(const absl::Status& status) const {
    if (!absl::IsUnavailable(status)) return status;
    return absl::UnavailableError(
        absl::StrCat("server ", options_.address, ": ", status.message()));
  }

  absl::Status CanShareMemory(const ServerInfo& info) const {
    if (!absl::StartsWith(options_.address, "unix:")) {
      return absl::FailedPreconditionError(
          absl::StrCat("memfd needs a Unix socket, address is ", options_.address));
    }
    if (std::find(info.transports.begin(), info.transports.end(), "memfd") ==
        info.transports.end()) {
      return absl::FailedPreconditionError("the server does not offer memfd");
    }
    return absl::OkStatus();
  }

  absl::Status CheckSize(uint64_t bytes) const {
    if (transport_ != Transport::kInline || max_inline_bytes_ == 0 || bytes <= max_inline_bytes_) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("request of ", bytes, " bytes inline, the server takes at most ",
                     max_inline_bytes_, "; use memfd, or a stream of smaller layers"));
  }

  KvPlacement placement() const {
    return transport_ == Transport::kMemfd ? KvPlacement::kRegionsOnly : KvPlacement::kAnywhere;
  }

  static RegionResolver Resolver(const std::shared_ptr<Session>& session) {
    if (session == nullptr) return [](const void*, int64_t, v1::RegionSlice*) { return false; };
    return [session](const void* data, int64_t size_bytes, v1::RegionSlice* slice) {
      return session->Resolve(data, size_bytes, slice);
    };
  }

  // Shared with the calls that are running, so that Reopen never takes it from under one.
  std::shared_ptr<Session> CurrentSession() const {
    absl::MutexLock lock(&mutex_);
    return session_;
  }

  const ClientOptions options_;
  const std::string client_uuid_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::CompressionService::Stub> compression_;
  const std::unique_ptr<v1::SessionService::Stub> sessions_;
  const std::unique_ptr<v1::ServerService::Stub> server_;
  // Written by Open only.
  Transport transport_ = Transport::kInline;
  std::string reason_;
  uint64_t max_inline_bytes_ = 0;
  mutable absl::Mutex mutex_;
  std::shared_ptr<Session> session_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::string_view TransportName(Transport transport) {
  switch (transport) {
    case Transport::kAuto:
      return "auto";
    case Transport::kMemfd:
      return "memfd";
    case Transport::kInline:
      return "inline";
  }
  return "";
}

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const ClientOptions& options) {
  KEEPSET_ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel, NewChannel(options));
  auto client = std::make_unique<GrpcClient>(options, std::move(channel));
  KEEPSET_RETURN_IF_ERROR(client->Open());
  return client;
}

absl::StatusOr<OperationResult> Client::CompressStreamed(const OperationSpec& spec,
                                                         absl::Span<const LayerInput> layers) {
  KEEPSET_ASSIGN_OR_RETURN(const std::unique_ptr<CompressStream> stream, OpenStream());
  KEEPSET_ASSIGN_OR_RETURN(const uint64_t operation, stream->Begin(spec));
  for (const LayerInput& layer : layers) {
    KEEPSET_RETURN_IF_ERROR(stream->SendLayer(operation, layer));
  }
  return stream->Finish(operation);
}

}  // namespace keepset::client
