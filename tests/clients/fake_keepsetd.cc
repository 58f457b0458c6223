#include "tests/clients/fake_keepsetd.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "keepset/v1/compression.grpc.pb.h"
#include "keepset/v1/server.grpc.pb.h"
#include "keepset/v1/session.grpc.pb.h"
#include "proto/side_socket_wire.h"

namespace keepset::client {
namespace {

constexpr int kPollMs = 10;

class Fake final : public FakeKeepsetd,
                   v1::CompressionService::Service,
                   v1::SessionService::Service,
                   v1::ServerService::Service {
 public:
  Fake(const std::string& directory, const FakeOptions& options)
      : options_(options), directory_(directory) {
    listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    sockaddr_un where = {};
    where.sun_family = AF_UNIX;
    const std::string path = directory_ + "/fd.sock";
    std::memcpy(where.sun_path, path.data(), path.size());
    unlink(path.c_str());
    (void)bind(listener_, reinterpret_cast<sockaddr*>(&where), sizeof(where));
    (void)listen(listener_, 8);
    side_thread_ = std::thread([this] { ServeSideSocket(); });
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address(), grpc::InsecureServerCredentials());
    builder.SetMaxReceiveMessageSize(-1);
    builder.RegisterService(static_cast<v1::CompressionService::Service*>(this));
    builder.RegisterService(static_cast<v1::SessionService::Service*>(this));
    builder.RegisterService(static_cast<v1::ServerService::Service*>(this));
    server_ = builder.BuildAndStart();
  }

  ~Fake() override {
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
    }
    side_thread_.join();
    close(listener_);
    for (const auto& [token, fd] : fds_) close(fd);
    for (const auto& [id, region] : regions_) munmap(region.data, region.size);
  }

  std::string address() const override { return "unix:" + directory_ + "/keepset.sock"; }

  FakeObservations Observed() override {
    absl::MutexLock lock(&mutex_);
    return seen_;
  }

  bool Await(bool (*condition)(const FakeObservations&), absl::Duration timeout) override {
    absl::MutexLock lock(&mutex_);
    const auto holds = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return condition(seen_); };
    return mutex_.AwaitWithTimeout(absl::Condition(&holds), timeout);
  }

 private:
  struct Region {
    std::byte* data;
    size_t size;
  };

  grpc::Status GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                             v1::GetServerInfoResponse* response) override {
    response->set_version("fake");
    response->add_policies("tova");
    response->add_transports("inline");
    if (options_.offers_memfd) response->add_transports("memfd");
    response->mutable_limits()->set_max_inline_bytes(options_.max_inline_bytes);
    return grpc::Status::OK;
  }

  grpc::Status OpenSession(grpc::ServerContext*, const v1::OpenSessionRequest* request,
                           v1::OpenSessionResponse* response) override {
    absl::MutexLock lock(&mutex_);
    seen_.client_uuids.push_back(request->client_uuid());
    session_id_ = directory_ + "#" + std::to_string(seen_.client_uuids.size());
    token_ = std::string(wire::kSideSocketTokenBytes, 'a' + seen_.client_uuids.size() % 26);
    response->set_session_id(session_id_);
    response->set_heartbeat_seconds(options_.heartbeat_seconds);
    if (options_.has_side_socket) response->set_side_socket_path(directory_ + "/fd.sock");
    response->set_side_socket_token(token_);
    return grpc::Status::OK;
  }

  grpc::Status Lease(grpc::ServerContext*,
                     grpc::ServerReaderWriter<v1::LeaseNotice, v1::LeaseBeat>* stream) override {
    v1::LeaseBeat beat;
    while (stream->Read(&beat)) {
      {
        absl::MutexLock lock(&mutex_);
        if (beat.session_id() != session_id_) {
          return grpc::Status(grpc::StatusCode::NOT_FOUND, "session");
        }
        ++seen_.beats;
      }
      stream->Write(v1::LeaseNotice());
    }
    return grpc::Status::OK;
  }

  grpc::Status CloseSession(grpc::ServerContext*, const v1::CloseSessionRequest*,
                            v1::CloseSessionResponse*) override {
    absl::MutexLock lock(&mutex_);
    ++seen_.closed_sessions;
    return grpc::Status::OK;
  }

  grpc::Status RegisterRegion(grpc::ServerContext*, const v1::RegisterRegionRequest* request,
                              v1::RegisterRegionResponse* response) override {
    absl::MutexLock lock(&mutex_);
    const auto fd = fds_.find(request->fd_token());
    if (fd == fds_.end()) return grpc::Status(grpc::StatusCode::NOT_FOUND, "fd token");
    if ((fcntl(fd->second, F_GET_SEALS) & F_SEAL_SHRINK) == 0) {
      return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "not sealed");
    }
    void* data = mmap(nullptr, request->length(), PROT_READ | PROT_WRITE, MAP_SHARED, fd->second,
                      static_cast<off_t>(request->offset()));
    if (data == MAP_FAILED) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "mmap");
    response->set_region_id("r" + std::to_string(regions_.size() + 1));
    regions_[response->region_id()] = {static_cast<std::byte*>(data), request->length()};
    seen_.region_names.push_back(request->name());
    return grpc::Status::OK;
  }

  grpc::Status RetireRegion(grpc::ServerContext*, const v1::RetireRegionRequest* request,
                            v1::RetireRegionResponse*) override {
    absl::MutexLock lock(&mutex_);
    seen_.retired.push_back(request->region_id());
    if (seen_.retired.size() <= static_cast<size_t>(options_.retires_in_use)) {
      return grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED, "in use");
    }
    return grpc::Status::OK;
  }

  void AddLayer(const v1::OperationSpec& spec, const v1::LayerInput& input,
                v1::OperationResult* result) {
    v1::LayerResult* layer = result->add_layers();
    layer->set_layer(input.layer());
    v1::KeepSet* set = layer->add_sets();
    std::vector<int32_t> kept(spec.budget().tokens());
    for (size_t i = 0; i < kept.size(); ++i) kept[i] = static_cast<int32_t>(i);
    if (spec.policy() == kLyingPolicy) std::reverse(kept.begin(), kept.end());
    set->set_kept(kept.size());
    set->set_indices(kept.data(), kept.size() * sizeof(int32_t));
    result->set_transport(input.k().data().has_region() ? "memfd" : "inline");
    const size_t bytes = kept.size() * spec.model().num_kv_heads() * spec.model().head_dim() * 4;
    if (spec.gather() == v1::GATHER_INLINE) {
      layer->set_k(std::string(bytes, static_cast<char>(kGatheredByte)));
      layer->set_v(layer->k());
    }
    if (spec.gather() != v1::GATHER_DESTINATION) return;
    absl::MutexLock lock(&mutex_);
    for (const v1::KvTensor* tensor : {&input.destination().k(), &input.destination().v()}) {
      const v1::RegionSlice& slice = tensor->data().region();
      const Region& region = regions_.at(slice.region_id());
      std::memset(region.data + slice.offset(), static_cast<int>(kGatheredByte), slice.length());
    }
  }

  static void Conclude(const v1::OperationSpec& spec, v1::OperationResult* result) {
    result->set_outcome(v1::OUTCOME_COMPRESSED);
    result->set_policy(spec.policy());
    result->set_scope(v1::SCOPE_LAYER_EQUAL);
    result->set_seq_len(spec.seq_len());
  }

  grpc::Status Compress(grpc::ServerContext* context, const v1::CompressRequest* request,
                        v1::CompressResponse* response) override {
    const v1::OperationSpec& spec = request->spec();
    if (spec.policy() == kRefusedPolicy) {
      return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "refused by script");
    }
    while (spec.policy() == kSilentPolicy && !context->IsCancelled()) poll(nullptr, 0, kPollMs);
    for (const v1::LayerInput& layer : request->layers()) {
      AddLayer(spec, layer, response->mutable_result());
    }
    Conclude(spec, response->mutable_result());
    return grpc::Status::OK;
  }

  void Grant(grpc::ServerReaderWriter<v1::StreamResponse, v1::StreamRequest>* stream,
             uint32_t credits) {
    v1::StreamResponse response;
    response.mutable_credit()->set_layer_inputs(credits);
    stream->Write(response);
  }

  grpc::Status CompressStream(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::StreamResponse, v1::StreamRequest>* stream) override {
    Grant(stream, options_.stream_credits);
    std::map<uint64_t, std::pair<v1::OperationSpec, v1::OperationResult>> open;
    int64_t unacknowledged = 0;
    v1::StreamRequest request;
    while (stream->Read(&request)) {
      const uint64_t id = request.operation_id();
      v1::StreamResponse response;
      response.set_operation_id(id);
      if (request.has_begin()) {
        open[id].first = request.begin();
        if (request.begin().policy() == kRefusedPolicy) {
          response.mutable_error()->set_code(3);
          response.mutable_error()->set_message("refused by script");
          stream->Write(response);
        }
        const bool is_deaf = request.begin().policy() == kDeafPolicy;
        while (is_deaf && !context->IsCancelled()) poll(nullptr, 0, kPollMs);
      } else if (request.has_layer()) {
        ++unacknowledged;
        {
          absl::MutexLock lock(&mutex_);
          seen_.max_layers_in_flight = std::max(seen_.max_layers_in_flight, unacknowledged);
        }
        AddLayer(open[id].first, request.layer(), &open[id].second);
        if (open[id].first.policy() == kSilentPolicy) continue;
        if (unacknowledged == options_.stream_credits) {
          Grant(stream, static_cast<uint32_t>(unacknowledged));
          unacknowledged = 0;
        }
      } else if (request.has_end()) {
        {
          absl::MutexLock lock(&mutex_);
          ++seen_.ended_operations;
        }
        if (open[id].first.policy() == kSilentPolicy) continue;
        Conclude(open[id].first, &open[id].second);
        *response.mutable_result() = std::move(open[id].second);
        stream->Write(response);
        open.erase(id);
      } else if (request.has_cancel()) {
        absl::MutexLock lock(&mutex_);
        ++seen_.cancelled_operations;
      }
    }
    return grpc::Status::OK;
  }

  // One connection after the other is enough for one client.
  void ServeSideSocket() {
    std::vector<pollfd> sockets = {{listener_, POLLIN, 0}};
    while (true) {
      {
        absl::MutexLock lock(&mutex_);
        if (stopping_) break;
      }
      if (poll(sockets.data(), sockets.size(), kPollMs) <= 0) continue;
      const size_t count = sockets.size();
      for (size_t i = 1; i < count; ++i) {
        if (sockets[i].revents == 0) continue;
        if (!Answer(sockets[i].fd)) {
          close(sockets[i].fd);
          sockets[i].fd = -1;
          absl::MutexLock lock(&mutex_);
          ++seen_.hang_ups;
        }
      }
      if (sockets[0].revents != 0) {
        sockets.push_back({accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC), POLLIN, 0});
      }
      std::erase_if(sockets, [](const pollfd& entry) { return entry.fd < 0; });
    }
    for (size_t i = 1; i < sockets.size(); ++i) close(sockets[i].fd);
  }

  bool Answer(int connection) {
    wire::SideSocketRequest request;
    iovec bytes = {&request, sizeof(request)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &bytes;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    if (recvmsg(connection, &message, MSG_CMSG_CLOEXEC) != sizeof(request)) return false;
    wire::SideSocketReply reply;
    {
      absl::MutexLock lock(&mutex_);
      if (request.type == wire::SideSocketFrameType::kHello) {
        const std::string token(reinterpret_cast<const char*>(request.token),
                                wire::kSideSocketTokenBytes);
        reply.code = token == token_ ? 0 : 7;
      } else {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
        reply.fd_token = fds_.size() + 1;
        fds_[reply.fd_token] = fd;
      }
    }
    return send(connection, &reply, sizeof(reply), MSG_NOSIGNAL) == sizeof(reply);
  }

  const FakeOptions options_;
  const std::string directory_;
  int listener_ = -1;
  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::string session_id_ ABSL_GUARDED_BY(mutex_);
  std::string token_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, int> fds_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, Region> regions_ ABSL_GUARDED_BY(mutex_);
  FakeObservations seen_ ABSL_GUARDED_BY(mutex_);
  std::thread side_thread_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace

std::unique_ptr<FakeKeepsetd> FakeKeepsetd::Start(const std::string& directory,
                                                  const FakeOptions& options) {
  return std::make_unique<Fake>(directory, options);
}

}  // namespace keepset::client
