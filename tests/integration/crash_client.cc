// A worker that stops in the middle of its life, for a test that kills it there:
//
//   crash_client ADDRESS PHASE
//
// prints one line when it stands in PHASE and then waits for ever. Its memory is named after the
// phase, so that the server's side can be searched for it.
#include <grpcpp/create_channel.h>
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

  const auto memory = client::SharedRegion::Create("crash-" + phase, 1 << 20);
  Want(memory.ok(), "memory");
  const absl::StatusOr<uint64_t> fd_token = (*side_socket)->PassFd((*memory)->fd());
  Want(fd_token.ok(), "descriptor");
  if (phase == "deposit") StandStill();

  v1::RegisterRegionRequest registration;
  registration.set_session_id(session.session_id());
  registration.set_name("kv");
  registration.set_kind("memfd");
  registration.set_fd_token(*fd_token);
  registration.set_allocation_bytes((*memory)->size_bytes());
  registration.set_length((*memory)->size_bytes());
  registration.set_access(v1::REGION_ACCESS_READ_WRITE);
  v1::RegisterRegionResponse region;
  {
    grpc::ClientContext context;
    Want(sessions->RegisterRegion(&context, registration, &region));
  }
  if (phase == "region") StandStill();

  const fakes::SyntheticPrompt prompt({});
  WorkerSession::Region lent;
  lent.id = region.region_id();
  lent.data = (*memory)->data();
  lent.bytes = (*memory)->size_bytes();
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
