#include "clients/cpp/table_client.h"

#include <grpcpp/grpcpp.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cpp/channel.h"
#include "clients/cpp/rpc_status.h"
#include "clients/cpp/table_codec.h"
#include "clients/cpp/wire_codec.h"
#include "keepset/v1/table.grpc.pb.h"

namespace keepset::client {
namespace {

class GrpcTableClient final : public TableClient {
 public:
  GrpcTableClient(const ClientOptions& options, const std::shared_ptr<grpc::Channel>& channel)
      : options_(options), stub_(v1::TableService::NewStub(channel)) {}

  absl::StatusOr<TableList> List(const std::string& name,
                                 const std::string& architecture) override {
    v1::ListTablesRequest request;
    request.set_name(name);
    request.set_architecture(architecture);
    v1::ListTablesResponse response;
    KEEPSET_RETURN_IF_ERROR(Call(&v1::TableService::Stub::List, request, &response));
    return DecodeList(response);
  }

  absl::StatusOr<TableDetails> Get(const TableRef& table) override {
    v1::GetTableRequest request;
    EncodeRef(table, request.mutable_table());
    v1::GetTableResponse response;
    KEEPSET_RETURN_IF_ERROR(Call(&v1::TableService::Stub::Get, request, &response));
    TableDetails details{DecodeVersion(response.version()), response.inspect_json(),
                         response.revision(), std::nullopt};
    if (response.has_requirements()) details.needs = DecodeNeeds(response.requirements());
    return details;
  }

  absl::StatusOr<TableValidation> Validate(const std::string& file_bytes,
                                           const std::string& signature) override {
    v1::ValidateTableRequest request;
    request.set_content(file_bytes);
    request.set_signature(signature);
    v1::ValidateTableResponse response;
    KEEPSET_RETURN_IF_ERROR(Call(&v1::TableService::Stub::Validate, request, &response));
    return DecodeValidation(response);
  }

  absl::StatusOr<TableUploadResult> Load(const std::string& file_bytes,
                                         const TableUpload& upload) override {
    v1::LoadTableRequest request;
    request.set_inline_(file_bytes);
    return Upload(std::move(request), upload);
  }

  absl::StatusOr<TableUploadResult> LoadPath(const std::string& path,
                                             const TableUpload& upload) override {
    v1::LoadTableRequest request;
    request.set_path(path);
    return Upload(std::move(request), upload);
  }

  absl::StatusOr<TableWriteResult> Activate(const TableRef& table, const std::string& set_alias,
                                            const TableWrite& write) override {
    v1::ActivateTableRequest request;
    EncodeRef(table, request.mutable_table());
    request.set_set_alias(set_alias);
    return Write(&v1::TableService::Stub::Activate, std::move(request), write);
  }

  absl::StatusOr<TableWriteResult> FollowNewest(const std::string& name,
                                                const TableWrite& write) override {
    v1::ActivateTableRequest request;
    request.mutable_table()->set_name(name);
    request.set_follow_newest(true);
    return Write(&v1::TableService::Stub::Activate, std::move(request), write);
  }

  absl::StatusOr<TableWriteResult> Rollback(const std::string& name,
                                            const TableWrite& write) override {
    v1::RollbackTableRequest request;
    request.set_name(name);
    return Write(&v1::TableService::Stub::Rollback, std::move(request), write);
  }

  absl::StatusOr<TableWriteResult> SetCanary(const TableRef& table, double percent,
                                             const std::string& salt,
                                             const TableWrite& write) override {
    v1::SetCanaryRequest request;
    EncodeRef(table, request.mutable_table());
    request.set_percent(percent);
    request.set_salt(salt);
    return Write(&v1::TableService::Stub::SetCanary, std::move(request), write);
  }

  absl::StatusOr<TableWriteResult> SetAlias(const std::string& name, const std::string& alias,
                                            const TableRef& table,
                                            const TableWrite& write) override {
    v1::SetAliasRequest request;
    request.set_name(name);
    request.set_alias(alias);
    EncodeRef(table, request.mutable_table());
    return Write(&v1::TableService::Stub::SetAlias, std::move(request), write);
  }

  absl::StatusOr<TableWriteResult> Unload(const TableRef& table, const TableWrite& write) override {
    v1::UnloadTableRequest request;
    EncodeRef(table, request.mutable_table());
    return Write(&v1::TableService::Stub::Unload, std::move(request), write);
  }

  absl::Status Watch(const std::string& name, const std::optional<TableRef>& until_active,
                     absl::Time deadline,
                     const std::function<Next(const TableChange&)>& on_change) override {
    v1::WatchTablesRequest request;
    request.set_name(name);
    if (until_active.has_value()) EncodeRef(*until_active, request.mutable_until_active());
    grpc::ClientContext context;
    if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
    const std::unique_ptr<grpc::ClientReader<v1::WatchTablesResponse>> reader =
        stub_->Watch(&context, request);
    v1::WatchTablesResponse response;
    Next next = Next::kContinue;
    while (next == Next::kContinue && reader->Read(&response)) {
      next = on_change(DecodeChange(response));
    }
    if (next == Next::kStop) {
      context.TryCancel();
      // Whatever the server still sent is behind what the caller wanted.
      static_cast<void>(reader->Finish());
      return absl::OkStatus();
    }
    return Explained(reader->Finish());
  }

 private:
  template <typename Request, typename Response>
  absl::Status Call(grpc::Status (v1::TableService::Stub::*method)(grpc::ClientContext*,
                                                                   const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + options_.call_timeout));
    return Explained((stub_.get()->*method)(&context, request, response));
  }

  template <typename Request>
  absl::StatusOr<TableWriteResult> Write(
      grpc::Status (v1::TableService::Stub::*method)(grpc::ClientContext*, const Request&,
                                                     v1::TableWriteResponse*),
      Request request, const TableWrite& write) {
    request.set_actor(write.actor);
    request.set_expected_revision(write.expected_revision);
    v1::TableWriteResponse response;
    KEEPSET_RETURN_IF_ERROR(Call(method, request, &response));
    return DecodeWrite(response);
  }

  absl::StatusOr<TableUploadResult> Upload(v1::LoadTableRequest request,
                                           const TableUpload& upload) {
    request.set_expected_digest(upload.expected_digest);
    request.set_signature(upload.signature);
    request.set_actor(upload.actor);
    v1::LoadTableResponse response;
    KEEPSET_RETURN_IF_ERROR(Call(&v1::TableService::Stub::Load, request, &response));
    return DecodeUpload(response);
  }

  // gRPC's own words for a dead address name resolver internals; the address is what helps.
  absl::Status Explained(const grpc::Status& status) const {
    absl::Status out = FromRpcStatus(status);
    if (!absl::IsUnavailable(out)) return out;
    return absl::UnavailableError(absl::StrCat("server ", options_.address, ": ", out.message()));
  }

  const ClientOptions options_;
  const std::unique_ptr<v1::TableService::Stub> stub_;
};

}  // namespace

absl::string_view TableStateName(TableState state) {
  switch (state) {
    case TableState::kValidating:
      return "validating";
    case TableState::kReady:
      return "ready";
    case TableState::kActive:
      return "active";
    case TableState::kRetired:
      return "retired";
    case TableState::kFailed:
      return "failed";
  }
  return "";
}

absl::StatusOr<std::unique_ptr<TableClient>> TableClient::New(const ClientOptions& options) {
  KEEPSET_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel, NewChannel(options));
  return std::make_unique<GrpcTableClient>(options, channel);
}

}  // namespace keepset::client
