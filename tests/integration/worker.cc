#include "tests/integration/worker.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include "proto/side_socket_wire.h"

namespace keepset::integration {
namespace {

v1::DType WireDType(kernels::DType dtype) { return static_cast<v1::DType>(dtype); }

void WireKv(const kernels::KvView& view, v1::KvTensor* out) {
  out->mutable_data()->set_inline_(view.data, view.size_bytes);
  out->set_dtype(WireDType(view.dtype));
  out->set_head_stride(view.head_stride);
  out->set_token_stride(view.token_stride);
  out->set_block_size(view.block_size);
  out->set_block_stride(view.block_stride);
  for (const int32_t block : view.block_table) out->add_block_table(block);
}

wire::SideSocketReply Exchange(int socket, const wire::SideSocketRequest& request, int fd) {
  iovec io = {const_cast<wire::SideSocketRequest*>(&request), sizeof(request)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  EXPECT_EQ(::sendmsg(socket, &message, 0), static_cast<ssize_t>(sizeof(request)));
  wire::SideSocketReply reply;
  EXPECT_EQ(::recv(socket, &reply, sizeof(reply), 0), static_cast<ssize_t>(sizeof(reply)));
  return reply;
}

std::string NewUuid() {
  static int count = 0;
  std::string uuid(16, '\0');
  const int number = ++count;
  std::memcpy(uuid.data(), &number, sizeof(number));
  return uuid;
}

}  // namespace

v1::OperationSpec WireSpec(const fakes::SyntheticPrompt& prompt, const std::string& policy,
                           uint64_t budget_tokens) {
  const engine::OperationSpec spec = prompt.spec();
  v1::OperationSpec wire;
  wire.set_request_id("request-1");
  v1::ModelFingerprint* model = wire.mutable_model();
  model->set_architecture(spec.model.architecture);
  model->set_num_layers(spec.model.num_layers);
  model->set_num_qo_heads(spec.model.num_qo_heads);
  model->set_num_kv_heads(spec.model.num_kv_heads);
  model->set_head_dim(spec.model.head_dim);
  wire.set_seq_len(spec.seq_len);
  wire.set_num_rows(spec.num_rows);
  wire.set_softmax_scale(spec.softmax_scale);
  wire.set_kv_dtype(WireDType(spec.kv_dtype));
  wire.set_policy(policy);
  wire.mutable_budget()->set_tokens(budget_tokens);
  return wire;
}

v1::LayerInput WireLayer(const fakes::SyntheticPrompt& prompt, int64_t layer) {
  const engine::LayerObservation observation = prompt.observation(layer);
  v1::LayerInput wire;
  wire.set_layer(static_cast<uint32_t>(layer));
  wire.mutable_q_window()->mutable_data()->set_inline_(observation.q_window.data,
                                                       observation.q_window.size_bytes);
  wire.mutable_q_window()->set_dtype(WireDType(observation.q_window.dtype));
  WireKv(observation.k, wire.mutable_k());
  WireKv(observation.v, wire.mutable_v());
  return wire;
}

v1::CompressRequest WireRequest(const fakes::SyntheticPrompt& prompt, const std::string& policy,
                                uint64_t budget_tokens) {
  v1::CompressRequest request;
  *request.mutable_spec() = WireSpec(prompt, policy, budget_tokens);
  for (int64_t layer = 0; layer < prompt.shape().num_layers; ++layer) {
    *request.add_layers() = WireLayer(prompt, layer);
  }
  return request;
}

grpc::Status Compress(TestServer& server, const v1::CompressRequest& request,
                      v1::OperationResult* result) {
  const auto context = NewContext();
  v1::CompressResponse response;
  grpc::Status status = server.compression()->Compress(context.get(), request, &response);
  if (result != nullptr) *result = response.result();
  return status;
}

WorkerSession::WorkerSession(TestServer& server, const std::string& tenant)
    : stub_(server.sessions()) {
  v1::OpenSessionRequest request;
  request.set_client_uuid(NewUuid());
  request.set_engine("test");
  request.set_tenant(tenant);
  v1::OpenSessionResponse response;
  const grpc::Status status = stub_->OpenSession(NewContext().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  id_ = response.session_id();

  side_socket_ = service::UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, response.side_socket_path().c_str(), sizeof(address.sun_path) - 1);
  EXPECT_EQ(::connect(side_socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)),
            0);
  wire::SideSocketRequest hello;
  EXPECT_EQ(response.side_socket_token().size(), sizeof(hello.token));
  std::memcpy(hello.token, response.side_socket_token().data(), sizeof(hello.token));
  EXPECT_EQ(Exchange(side_socket_.get(), hello, -1).code, 0);
}

uint64_t WorkerSession::PassFd(int fd) {
  wire::SideSocketRequest request;
  request.type = wire::SideSocketFrameType::kPassFd;
  return Exchange(side_socket_.get(), request, fd).fd_token;
}

WorkerSession::Region WorkerSession::Register(const std::string& name, size_t bytes,
                                              v1::RegionAccess access) {
  Region region;
  region.bytes = bytes;
  region.fd = service::UniqueFd(::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(region.fd.get(), static_cast<off_t>(bytes)), 0);
  EXPECT_EQ(::fcntl(region.fd.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  region.data = static_cast<std::byte*>(
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd.get(), 0));
  v1::RegisterRegionRequest request;
  request.set_session_id(id_);
  request.set_name(name);
  request.set_kind("memfd");
  request.set_fd_token(PassFd(region.fd.get()));
  request.set_allocation_bytes(bytes);
  request.set_length(bytes);
  request.set_access(access);
  v1::RegisterRegionResponse response;
  const grpc::Status status = stub_->RegisterRegion(NewContext().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  region.id = response.region_id();
  return region;
}

grpc::Status WorkerSession::Retire(const std::string& region_id, uint32_t timeout_ms) {
  v1::RetireRegionRequest request;
  request.set_session_id(id_);
  request.set_region_id(region_id);
  request.set_timeout_ms(timeout_ms);
  v1::RetireRegionResponse response;
  return stub_->RetireRegion(NewContext().get(), request, &response);
}

v1::ListRegionsResponse WorkerSession::List() {
  v1::ListRegionsRequest request;
  request.set_session_id(id_);
  v1::ListRegionsResponse response;
  const grpc::Status status = stub_->ListRegions(NewContext().get(), request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response;
}

void RegionWriter::Put(absl::Span<const std::byte> bytes, v1::TensorData* data) {
  const uint64_t offset = Reserve(bytes.size(), data);
  std::memcpy(region_.data + offset, bytes.data(), bytes.size());
}

uint64_t RegionWriter::Reserve(size_t bytes, v1::TensorData* data) {
  const uint64_t offset = end_;
  end_ = (end_ + bytes + 63) / 64 * 64;
  EXPECT_LE(end_, region_.bytes);
  v1::RegionSlice* slice = data->mutable_region();
  slice->set_region_id(region_.id);
  slice->set_offset(offset);
  slice->set_length(bytes);
  return offset;
}

v1::CompressRequest ToRegion(const v1::CompressRequest& request, const std::string& session_id,
                             WorkerSession::Region& region) {
  v1::CompressRequest moved = request;
  moved.mutable_spec()->set_session_id(session_id);
  RegionWriter writer(region);
  for (v1::LayerInput& layer : *moved.mutable_layers()) {
    for (v1::TensorData* data :
         {layer.mutable_q_window()->mutable_data(), layer.mutable_k()->mutable_data(),
          layer.mutable_v()->mutable_data()}) {
      const std::string bytes = data->inline_();
      writer.Put({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}, data);
    }
  }
  return moved;
}

WorkerStream::WorkerStream(TestServer& server)
    : stub_(server.compression()), context_(NewContext()) {
  stream_ = stub_->CompressStream(context_.get());
}

WorkerStream::~WorkerStream() {
  if (finished_) return;
  Kill();
  stream_->Finish();
}

void WorkerStream::Begin(uint64_t id, const v1::OperationSpec& spec) {
  v1::StreamRequest request;
  request.set_operation_id(id);
  *request.mutable_begin() = spec;
  stream_->Write(request);
}

void WorkerStream::Layer(uint64_t id, const v1::LayerInput& layer) {
  v1::StreamRequest request;
  request.set_operation_id(id);
  *request.mutable_layer() = layer;
  stream_->Write(request);
}

void WorkerStream::End(uint64_t id) {
  v1::StreamRequest request;
  request.set_operation_id(id);
  request.mutable_end();
  stream_->Write(request);
}

void WorkerStream::Cancel(uint64_t id) {
  v1::StreamRequest request;
  request.set_operation_id(id);
  request.mutable_cancel();
  stream_->Write(request);
}

std::optional<v1::StreamResponse> WorkerStream::Next() {
  v1::StreamResponse response;
  while (stream_->Read(&response)) {
    if (!response.has_credit()) return response;
    credit_ += response.credit().layer_inputs();
  }
  return std::nullopt;
}

std::optional<v1::StreamResponse> WorkerStream::NextAnswer() {
  std::optional<v1::StreamResponse> response = Next();
  while (response.has_value() && response->has_layer()) response = Next();
  return response;
}

bool WorkerStream::AwaitCredit(uint64_t total) {
  v1::StreamResponse response;
  while (credit_ < total && stream_->Read(&response)) {
    credit_ += response.credit().layer_inputs();
  }
  return credit_ >= total;
}

void WorkerStream::HalfClose() {
  if (!half_closed_) stream_->WritesDone();
  half_closed_ = true;
}

grpc::Status WorkerStream::Finish() {
  HalfClose();
  while (Next().has_value()) {
  }
  finished_ = true;
  return stream_->Finish();
}

}  // namespace keepset::integration
