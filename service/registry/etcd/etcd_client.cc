#include "service/registry/etcd/etcd_client.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "etcd/rpc.grpc.pb.h"
#include "service/registry/etcd/etcd_connection.h"
#include "service/registry/etcd/etcd_watch_stream.h"

namespace keepset::service::etcd {
namespace {

// A value is as large as a request of etcd may be, 1.5 MiB unless it was told otherwise.
constexpr int kKeysPerCall = 16;
// How often a read begins anew because the store was compacted under it.
constexpr int kMaxReads = 5;

absl::Status Unsure(const absl::Status& status) {
  return {status.code(), absl::StrCat(status.message(),
                                      "; it is not known whether the change was made, read again "
                                      "before it is repeated")};
}

// etcd knows no empty key.
absl::string_view PrefixStart(absl::string_view prefix) {
  return prefix.empty() ? absl::string_view("\0", 1) : prefix;
}

class ClientImpl final : public Client {
 public:
  ClientImpl(const ClientOptions& options, std::vector<Endpoint> endpoints)
      : connections_(options, std::move(endpoints)) {}

  absl::StatusOr<RangeResult> ReadPrefix(absl::string_view prefix) override {
    absl::StatusOr<RangeResult> result;
    for (int read = 0; read < kMaxReads; ++read) {
      result = ReadRange(PrefixStart(prefix), PrefixEnd(prefix));
      if (!absl::IsOutOfRange(result.status())) return result;
    }
    return absl::UnavailableError(result.status().message());
  }

  absl::StatusOr<int64_t> NewestRevision(absl::string_view prefix) override {
    etcdserverpb::RangeRequest request;
    request.set_key(std::string(PrefixStart(prefix)));
    request.set_range_end(PrefixEnd(prefix));
    request.set_sort_order(etcdserverpb::RangeRequest::DESCEND);
    request.set_sort_target(etcdserverpb::RangeRequest::MOD);
    request.set_limit(1);
    request.set_keys_only(true);
    etcdserverpb::RangeResponse response;
    KEEPSET_RETURN_IF_ERROR(Range(request, response).status());
    return response.kvs().empty() ? 0 : response.kvs(0).mod_revision();
  }

  absl::StatusOr<int64_t> Commit(const std::vector<Condition>& conditions,
                                 const std::vector<Write>& writes) override {
    if (writes.empty()) return absl::InvalidArgumentError("etcd: a commit of no writes");
    etcdserverpb::TxnRequest request;
    for (const Condition& condition : conditions) {
      etcdserverpb::Compare* compare = request.add_compare();
      compare->set_key(condition.key);
      compare->set_target(etcdserverpb::Compare::MOD);
      compare->set_result(etcdserverpb::Compare::EQUAL);
      compare->set_mod_revision(condition.mod_revision);
    }
    for (const Write& write : writes) {
      if (write.kind == Write::Kind::kPut) {
        etcdserverpb::PutRequest* put = request.add_success()->mutable_request_put();
        put->set_key(write.key);
        put->set_value(write.value);
      } else {
        request.add_success()->mutable_request_delete_range()->set_key(write.key);
      }
    }
    // A transaction may be carried out though its answer is lost, so it is not tried elsewhere;
    // what finds an endpoint that answers is a read.
    KEEPSET_ASSIGN_OR_RETURN(const Connections::ConnectionPtr connection,
                             FindEndpoint(conditions.empty() ? writes[0].key : conditions[0].key));
    etcdserverpb::TxnResponse response;
    const absl::Status status = connections_.CallOnce(
        "Txn", *connection, [&](const Connection& to, grpc::ClientContext& context) {
          return etcdserverpb::KV::NewStub(to.channel)->Txn(&context, request, &response);
        });
    if (IsUnreachable(status)) return Unsure(status);
    KEEPSET_RETURN_IF_ERROR(status);
    if (!response.succeeded()) {
      return absl::AbortedError(absl::StrCat("etcd ", connection->address, ": ",
                                             conditions.empty() ? "" : conditions[0].key,
                                             " was changed by somebody else meanwhile"));
    }
    return response.header().revision();
  }

  absl::StatusOr<std::unique_ptr<WatchStream>> Watch(absl::string_view prefix,
                                                     int64_t first_revision) override {
    // Also sees to it that the token is taken: a watch cannot be repeated as a call can.
    KEEPSET_ASSIGN_OR_RETURN(Connections::ConnectionPtr connection,
                             FindEndpoint(PrefixStart(prefix)));
    return NewWatchStream(std::move(connection), PrefixStart(prefix), PrefixEnd(prefix),
                          first_revision);
  }

  void UseNextEndpoint() override { connections_.UseNextEndpoint(); }
  void Shutdown() override { connections_.Shutdown(); }

 private:
  absl::StatusOr<Connections::ConnectionPtr> Range(const etcdserverpb::RangeRequest& request,
                                                   etcdserverpb::RangeResponse& response) {
    return connections_.Call("Range", [&](const Connection& to, grpc::ClientContext& context) {
      response.Clear();
      return etcdserverpb::KV::NewStub(to.channel)->Range(&context, request, &response);
    });
  }

  absl::StatusOr<RangeResult> ReadRange(absl::string_view key, const std::string& end) {
    etcdserverpb::RangeRequest request;
    request.set_key(std::string(key));
    request.set_range_end(end);
    request.set_limit(kKeysPerCall);
    RangeResult result;
    while (true) {
      etcdserverpb::RangeResponse response;
      KEEPSET_RETURN_IF_ERROR(Range(request, response).status());
      if (result.revision == 0) {
        result.cluster_id = response.header().cluster_id();
        result.revision = response.header().revision();
        request.set_revision(result.revision);
      } else if (response.header().cluster_id() != result.cluster_id) {
        return absl::UnavailableError("etcd: the endpoints belong to different clusters");
      }
      for (mvccpb::KeyValue& pair : *response.mutable_kvs()) {
        result.pairs.push_back({.key = std::move(*pair.mutable_key()),
                                .value = std::move(*pair.mutable_value()),
                                .mod_revision = pair.mod_revision()});
      }
      if (!response.more() || response.kvs().empty()) return result;
      request.set_key(absl::StrCat(result.pairs.back().key, absl::string_view("\0", 1)));
    }
  }

  // `key` is one that our user may read.
  absl::StatusOr<Connections::ConnectionPtr> FindEndpoint(absl::string_view key) {
    etcdserverpb::RangeRequest request;
    request.set_key(std::string(key));
    request.set_count_only(true);
    etcdserverpb::RangeResponse response;
    return Range(request, response);
  }

  Connections connections_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> NewClient(const ClientOptions& options) {
  KEEPSET_ASSIGN_OR_RETURN(std::vector<Endpoint> endpoints, ParseEndpoints(options));
  return std::make_unique<ClientImpl>(options, std::move(endpoints));
}

std::string PrefixEnd(absl::string_view prefix) {
  std::string end(prefix);
  while (!end.empty() && end.back() == '\xff') end.pop_back();
  if (end.empty()) return std::string("\0", 1);  // to the last key
  ++end.back();
  return end;
}

}  // namespace keepset::service::etcd
