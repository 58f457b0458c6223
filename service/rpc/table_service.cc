#include "service/rpc/table_service.h"

#include <chrono>
#include <functional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "service/registry/contained_read.h"
#include "service/rpc/open_streams.h"
#include "service/rpc/requirements.h"
#include "service/rpc/table_codec.h"
#include "service/rpc/table_findings.h"
#include "service/rpc/table_watch_reactor.h"
#include "service/rpc/wire_status.h"
#include "tables/table_file.h"

namespace keepset::service {
namespace {

// A peer's text in our log and in the history.
constexpr size_t kMaxActorBytes = 128;
constexpr size_t kMaxLoggedError = 2048;

// What the audit line of a write says beside who.
struct Audit {
  std::string what;  // the table as asked for, and what shall become of it
  uint64_t revision = 0;
  std::string digest;
};

std::string Named(const v1::TableRef& ref) {
  std::string text = ref.name();
  if (!ref.version().empty()) absl::StrAppend(&text, "@", ref.version());
  if (!ref.digest().empty()) absl::StrAppend(&text, " ", ref.digest());
  if (!ref.alias().empty()) absl::StrAppend(&text, " alias ", ref.alias());
  return ToText(text, 2 * kMaxActorBytes);
}

std::string TlsSubject(const grpc::CallbackServerContext& call) {
  const auto context = call.auth_context();
  if (context == nullptr || !context->IsPeerAuthenticated()) return "";
  const auto names = context->GetPeerIdentity();
  return names.empty() ? "" : std::string(names[0].data(), names[0].size());
}

class TableServiceImpl final : public TableService {
 public:
  TableServiceImpl(TableServiceOptions options, const TableServiceContext& context)
      : options_(std::move(options)), context_(context) {}

  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* call,
                                 const v1::ListTablesRequest* request,
                                 v1::ListTablesResponse* response) override {
    const std::shared_ptr<const RegistryView> view = context_.registry.View();
    response->set_revision(ShownRevision(*view));
    for (const auto& [name, line] : view->lines) {
      if (!request->name().empty() && request->name() != name) continue;
      if (!IsOfModel(*line, request->architecture())) continue;
      EncodeLine(*line, response->add_lines());
    }
    if (request->name().empty() && request->architecture().empty()) {
      for (const TableVersionInfo& version : view->nameless) {
        EncodeVersion(version, response->add_nameless());
      }
    }
    for (const SourceView& source : view->sources) EncodeSource(source, response->add_sources());
    response->set_writable(CheckMayWrite(*call, "List").ok());
    response->set_authority(std::string(context_.authority.kind()));
    return Answer(call, absl::OkStatus());
  }

  grpc::ServerUnaryReactor* Get(grpc::CallbackServerContext* call,
                                const v1::GetTableRequest* request,
                                v1::GetTableResponse* response) override {
    const auto version = context_.registry.Find(DecodeTableRef(request->table()));
    if (version.ok()) {
      EncodeVersion(*version, response->mutable_version());
      response->set_inspect_json(tables::InspectTable(*version->table));
      const std::shared_ptr<const RegistryView> view = context_.registry.View();
      const auto line = view->lines.find(version->name);
      if (line != view->lines.end()) response->set_revision(line->second->revision);
      v1::GetRequirementsResponse needs;
      // A kind without a policy here is no fault of the question.
      if (DescribeTableRequirements(context_.policies, version->table, needs).ok()) {
        *response->mutable_requirements() = std::move(needs);
      }
    }
    return Answer(call, version.status());
  }

  grpc::ServerUnaryReactor* Validate(grpc::CallbackServerContext* call,
                                     const v1::ValidateTableRequest* request,
                                     v1::ValidateTableResponse* response) override {
    return RunBlocking(call, [this, request, response] {
      if (request->subject_case() == v1::ValidateTableRequest::kContent) {
        KEEPSET_RETURN_IF_ERROR(CheckSize(request->content().size()));
      }
      return FindFindings(*request, context_.registry, context_.validator, response);
    });
  }

  grpc::ServerUnaryReactor* Load(grpc::CallbackServerContext* call,
                                 const v1::LoadTableRequest* request,
                                 v1::LoadTableResponse* response) override {
    return Write(call, "Load", request->actor(), 0,
                 [this, request, response](const WriteContext& context, Audit& audit) {
                   audit.what = request->content_case() == v1::LoadTableRequest::kPath
                                    ? absl::StrCat("path ", ToText(request->path(), kMaxActorBytes))
                                    : absl::StrCat(request->inline_().size(), " bytes");
                   LoadArgs args;
                   KEEPSET_ASSIGN_OR_RETURN(args.bytes, ContentOf(*request));
                   args.origin = request->content_case() == v1::LoadTableRequest::kPath
                                     ? request->path()
                                     : "upload";
                   args.expected_digest = request->expected_digest();
                   args.signature = request->signature();
                   KEEPSET_ASSIGN_OR_RETURN(const LoadReceipt receipt,
                                            context_.authority.Load(args, context));
                   audit.what = absl::StrCat(receipt.version.name, "@", receipt.version.version);
                   audit.digest = receipt.version.digest;
                   audit.revision = receipt.revision;
                   EncodeVersion(receipt.version, response->mutable_version());
                   response->set_revision(receipt.revision);
                   response->set_durable(receipt.durable);
                   response->set_already_loaded(receipt.already_loaded);
                   return absl::OkStatus();
                 });
  }

  grpc::ServerUnaryReactor* Activate(grpc::CallbackServerContext* call,
                                     const v1::ActivateTableRequest* request,
                                     v1::TableWriteResponse* response) override {
    return WriteLine(
        call, "Activate", request->actor(), request->expected_revision(), response,
        absl::StrCat(Named(request->table()), request->follow_newest() ? " follow_newest" : ""),
        [this, request](const WriteContext& context) {
          return request->follow_newest()
                     ? context_.authority.FollowNewest(request->table().name(), context)
                     : context_.authority.Activate(DecodeTableRef(request->table()),
                                                   request->set_alias(), context);
        });
  }

  grpc::ServerUnaryReactor* Rollback(grpc::CallbackServerContext* call,
                                     const v1::RollbackTableRequest* request,
                                     v1::TableWriteResponse* response) override {
    return WriteLine(call, "Rollback", request->actor(), request->expected_revision(), response,
                     ToText(request->name(), kMaxActorBytes),
                     [this, request](const WriteContext& context) {
                       return context_.authority.Rollback(request->name(), context);
                     });
  }

  grpc::ServerUnaryReactor* SetCanary(grpc::CallbackServerContext* call,
                                      const v1::SetCanaryRequest* request,
                                      v1::TableWriteResponse* response) override {
    return WriteLine(call, "SetCanary", request->actor(), request->expected_revision(), response,
                     absl::StrCat(Named(request->table()), " ", request->percent(), "%"),
                     [this, request](const WriteContext& context) -> absl::StatusOr<WriteReceipt> {
                       KEEPSET_ASSIGN_OR_RETURN(const int basis_points,
                                                DecodePercent(request->percent()));
                       return context_.authority.SetCanary(DecodeTableRef(request->table()),
                                                           basis_points, request->salt(), context);
                     });
  }

  grpc::ServerUnaryReactor* SetAlias(grpc::CallbackServerContext* call,
                                     const v1::SetAliasRequest* request,
                                     v1::TableWriteResponse* response) override {
    return WriteLine(
        call, "SetAlias", request->actor(), request->expected_revision(), response,
        absl::StrCat(ToText(request->name(), kMaxActorBytes), " ",
                     ToText(request->alias(), kMaxActorBytes), " -> ", Named(request->table())),
        [this, request](const WriteContext& context) {
          return context_.authority.SetAlias(request->name(), request->alias(),
                                             DecodeTableRef(request->table()), context);
        });
  }

  grpc::ServerUnaryReactor* Unload(grpc::CallbackServerContext* call,
                                   const v1::UnloadTableRequest* request,
                                   v1::TableWriteResponse* response) override {
    return WriteLine(call, "Unload", request->actor(), request->expected_revision(), response,
                     Named(request->table()), [this, request](const WriteContext& context) {
                       return context_.authority.Unload(DecodeTableRef(request->table()), context);
                     });
  }

  grpc::ServerWriteReactor<v1::WatchTablesResponse>* Watch(
      grpc::CallbackServerContext* /*call*/, const v1::WatchTablesRequest* request) override {
    return StartTableWatch(*request, context_.registry, streams_);
  }

  void CloseStreams() override { streams_.CloseAll(); }

 private:
  static bool IsOfModel(const LineView& line, const std::string& architecture) {
    if (architecture.empty()) return true;
    for (const TableVersionInfo& version : line.versions) {
      if (version.table != nullptr && version.table->model().architecture == architecture) {
        return true;
      }
    }
    return false;
  }

  absl::Status CheckSize(size_t bytes) const {
    if (bytes <= static_cast<size_t>(options_.max_table_bytes)) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrCat("table: ", bytes, " bytes, want at most ",
                                                     options_.max_table_bytes,
                                                     " (limits.max_table_bytes)"));
  }

  absl::StatusOr<std::string> ContentOf(const v1::LoadTableRequest& request) const {
    switch (request.content_case()) {
      case v1::LoadTableRequest::kInline:
        KEEPSET_RETURN_IF_ERROR(CheckSize(request.inline_().size()));
        return request.inline_();
      case v1::LoadTableRequest::kPath:
        if (options_.tables_directory.empty()) {
          return absl::FailedPreconditionError(
              "path: this server has no tables directory, want the table inline");
        }
        return ReadContained(options_.tables_directory, request.path(), options_.max_table_bytes);
      case v1::LoadTableRequest::CONTENT_NOT_SET:
        break;
    }
    return absl::InvalidArgumentError("content: want inline or path");
  }

  using LineChange = std::function<absl::StatusOr<WriteReceipt>(const WriteContext&)>;
  using Work = std::function<absl::Status(const WriteContext&, Audit&)>;

  grpc::ServerUnaryReactor* WriteLine(grpc::CallbackServerContext* call, absl::string_view method,
                                      const std::string& actor, uint64_t expected_revision,
                                      v1::TableWriteResponse* response, std::string what,
                                      LineChange change) {
    return Write(call, method, actor, expected_revision,
                 [response, what = std::move(what), change = std::move(change)](
                     const WriteContext& context, Audit& audit) {
                   audit.what = what;
                   KEEPSET_ASSIGN_OR_RETURN(const WriteReceipt receipt, change(context));
                   audit.revision = receipt.revision;
                   if (receipt.line->assignment.active.has_value()) {
                     audit.digest = receipt.line->assignment.active->digest;
                   }
                   response->set_revision(receipt.revision);
                   response->set_previous_version(receipt.previous_version);
                   response->set_durable(receipt.durable);
                   EncodeLine(*receipt.line, response->mutable_line());
                   return absl::OkStatus();
                 });
  }

  grpc::ServerUnaryReactor* Write(grpc::CallbackServerContext* call, absl::string_view method,
                                  const std::string& actor, uint64_t expected_revision, Work work) {
    return RunBlocking(call, [this, call, name = std::string(method), actor, expected_revision,
                              work = std::move(work)] {
      WriteContext context;
      context.actor = ToText(actor, kMaxActorBytes);
      context.expected_revision = expected_revision;
      context.deadline = absl::FromChrono(call->deadline());
      Audit audit;
      absl::Status status = CheckMayWrite(*call, name);
      if (status.ok()) status = work(context, audit);
      WriteAuditLine(*call, name, context, audit, status);
      return status;
    });
  }

  absl::Status CheckMayWrite(const grpc::CallbackServerContext& call,
                             absl::string_view method) const {
    if (options_.writes != TableWrites::kAllowed) {
      return absl::PermissionDeniedError(absl::StrCat(
          method, " is switched off, want a server started with table_writes (--table-writes)"));
    }
    if (options_.writers.empty()) return absl::OkStatus();
    std::string caller = TlsSubject(call);
    if (caller.empty() && absl::StartsWith(call.peer(), kUnixWriter))
      caller = std::string(kUnixWriter);
    if (options_.writers.contains(caller)) return absl::OkStatus();
    return absl::PermissionDeniedError(
        absl::StrCat(method, ": ", caller.empty() ? "a caller without a certificate" : caller,
                     " is not among the server's table_writers"));
  }

  void WriteAuditLine(const grpc::CallbackServerContext& call, const std::string& method,
                      const WriteContext& context, const Audit& audit, const absl::Status& status) {
    LogFields fields = {{"method", method},
                        {"peer", call.peer()},
                        {"tls_subject", TlsSubject(call)},
                        {"actor", context.actor},
                        {"table", audit.what},
                        {"authority", std::string(context_.authority.kind())},
                        {"result", absl::StatusCodeToString(status.code())}};
    if (status.ok()) {
      fields.emplace_back("revision", absl::StrCat(audit.revision));
      fields.emplace_back("digest", audit.digest);
    } else {
      fields.emplace_back("error", ToText(status.message(), kMaxLoggedError));
    }
    context_.log.Write(status.ok() ? LogSeverity::kInfo : LogSeverity::kWarning, "table_write",
                       fields);
  }

  template <typename Fn>
  grpc::ServerUnaryReactor* RunBlocking(grpc::CallbackServerContext* call, Fn fn) {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    const absl::Status queued = context_.blocking.Submit(
        [this, reactor, fn = std::move(fn)] { reactor->Finish(Public(fn())); });
    if (!queued.ok()) reactor->Finish(Public(queued));
    return reactor;
  }

  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* call, const absl::Status& status) {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    reactor->Finish(Public(status));
    return reactor;
  }

  grpc::Status Public(const absl::Status& status) const {
    if (status.ok()) return grpc::Status::OK;
    const std::string correlation_id = context_.correlation_ids.Next();
    if (absl::IsInternal(status) || absl::IsUnknown(status)) {
      context_.log.Error("call", {{"method", "TableService"},
                                  {"correlation_id", correlation_id},
                                  {"error", ToText(status.message(), kMaxLoggedError)}});
    }
    return ToGrpcStatus(PublicStatus(status, correlation_id));
  }

  const TableServiceOptions options_;
  const TableServiceContext context_;
  OpenStreams streams_;
};

}  // namespace

std::unique_ptr<TableService> TableService::New(TableServiceOptions options,
                                                const TableServiceContext& context) {
  return std::make_unique<TableServiceImpl>(std::move(options), context);
}

}  // namespace keepset::service
