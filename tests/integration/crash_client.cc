// A worker that stops in the middle of its life, for a test that kills it there:
//
//   crash_client ADDRESS PHASE
//
// prints one line when it stands in PHASE and then waits for ever. Its memory is named after the
// phase, so that the server's side can be searched for it; in phases "owned..." it is the server's.
#include <grpcpp/create_channel.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>

#include "clients/cpp/shared_region.h"
#include "clients/cpp/side_socket.h"
#include "keepset/v1/compression.grpc.pb.h"
#include "keepset/v1/session.grpc.pb.h"
#include "tests/integration/worker.h"

namespace keepset::integration {
namespace {

constexpr int64_t kRegionBytes = 1 << 20;

[[noreturn]] void StandStill() {
  std::cout << "ready" << std::endl;
  while (true) ::pause();
}

void Want(bool holds, const std::string& what) {
  if (holds) return;
  std::cout << "failed: " << what << std::endl;
  std::_Exit(1);
}

void Want(const grpc::Status& status) { Want(status.ok(), status.error_message()); }

WorkerSession::Region Register(v1::SessionService::Stub& sessions, const std::string& session_id,
                               const client::SharedRegion& memory, uint64_t fd_token) {
  v1::RegisterRegionRequest registration;
  registration.set_session_id(session_id);
  registration.set_name("kv");
  registration.set_kind("memfd");
  registration.set_fd_token(fd_token);
  registration.set_allocation_bytes(memory.size_bytes());
  registration.set_length(memory.size_bytes());
  registration.set_access(v1::REGION_ACCESS_READ_WRITE);
  v1::RegisterRegionResponse response;
  grpc::ClientContext context;
  Want(sessions.RegisterRegion(&context, registration, &response));
  WorkerSession::Region region;
  region.id = response.region_id();
  region.data = memory.data();
  region.bytes = memory.size_bytes();
  return region;
}

WorkerSession::Region Allocate(v1::SessionService::Stub& sessions, const std::string& session_id,
                               client::SideSocket& side_socket) {
  v1::AllocateRegionRequest request;
  request.set_session_id(session_id);
  request.set_name("kv");
  request.set_kind("memfd");
  request.set_length(kRegionBytes);
  v1::AllocateRegionResponse response;
  grpc::ClientContext context;
  Want(sessions.AllocateRegion(&context, request, &response));
  const absl::StatusOr<int> fd = side_socket.FetchFd(response.fd_token());
  Want(fd.ok(), "fetch");
  void* const data = ::mmap(nullptr, kRegionBytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
  Want(data != MAP_FAILED, "mmap");
  WorkerSession::Region region;
  region.id = response.region_id();
  region.data = static_cast<std::byte*>(data);
  region.bytes = kRegionBytes;
  region.fd.Reset(*fd);
  return region;
}

int Main(const std::string& address, const std::string& phase) {
  const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  const auto sessions = v1::SessionService::NewStub(channel);
  const auto compression = v1::CompressionService::NewStub(channel);

  v1::OpenSessionRequest open;
  open.set_client_uuid(std::string(16, 'c'));
  open.set_engine(phase);
  open.set_lease_seconds(1);
  v1::OpenSessionResponse session;
  {
    grpc::ClientContext context;
    Want(sessions->OpenSession(&context, open, &session));
  }
  if (phase == "session") StandStill();

  auto side_socket = client::SideSocket::Connect(session.side_socket_path(),
                                                 session.side_socket_token(), absl::Seconds(10));
  Want(side_socket.ok(), "hello");
  if (phase == "hello") StandStill();

  absl::StatusOr<std::unique_ptr<client::SharedRegion>> memory;
  WorkerSession::Region lent;
  if (phase.rfind("owned", 0) == 0) {
    lent = Allocate(*sessions, session.session_id(), **side_socket);
    if (phase == "owned") StandStill();
  } else {
    memory = client::SharedRegion::Create("crash-" + phase, kRegionBytes);
    Want(memory.ok(), "memory");
    const absl::StatusOr<uint64_t> fd_token = (*side_socket)->PassFd((*memory)->fd());
    Want(fd_token.ok(), "descriptor");
    if (phase == "deposit") StandStill();
    lent = Register(*sessions, session.session_id(), **memory, *fd_token);
    if (phase == "region") StandStill();
  }

  const fakes::SyntheticPrompt prompt({});
  const v1::CompressRequest request =
      ToRegion(WireRequest(prompt, "snapkv", 24), session.session_id(), lent);
  grpc::ClientContext context;
  const auto stream = compression->CompressStream(&context);
  v1::StreamRequest step;
  step.set_operation_id(1);
  *step.mutable_begin() = request.spec();
  Want(stream->Write(step), "begin");
  for (const v1::LayerInput& layer : request.layers()) {
    *step.mutable_layer() = layer;
    Want(stream->Write(step), "layer");
    if (phase == "layer") {
      v1::StreamResponse response;
      while (!response.has_layer()) Want(stream->Read(&response), "early result");
      StandStill();
    }
  }
  step.mutable_end();
  Want(stream->Write(step), "end");
  // Neither "running" nor "answered" reads: the server's side says when the one is the other.
  StandStill();
}

}  // namespace
}  // namespace keepset::integration

int main(int argc, char** argv) {
  return argc == 3 ? keepset::integration::Main(argv[1], argv[2]) : 2;
}
