#include "service/health_listener.h"

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <chrono>

#include "absl/strings/str_cat.h"
#include "service/reflection_choice.h"

namespace keepset::service {
namespace {

// A health request is a service name.
constexpr int kMaxMessageBytes = 4096;

class TcpHealthListener final : public HealthListener {
 public:
  explicit TcpHealthListener(HealthBoard& board) : board_(board) {}

  ~TcpHealthListener() override {
    if (server_ == nullptr) return;
    board_.Detach(server_->GetHealthCheckService());
    // Probes that watch a stream never end by themselves.
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  absl::Status Listen(const std::string& address) {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    builder.SetOption(NewReflectionChoice(Reflection::kOff));
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    int port = 0;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
    // gRPC starts no server without a service; this one answers UNIMPLEMENTED to everything.
    builder.RegisterCallbackGenericService(&refuse_);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port == 0) {
      return absl::AlreadyExistsError(absl::StrCat(
          "health_listen ", address, ": cannot be bound, the address is in use or not ours"));
    }
    address_ = absl::StrCat(address.substr(0, address.rfind(':')), ":", port);
    board_.Attach(server_->GetHealthCheckService());
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

 private:
  HealthBoard& board_;
  grpc::CallbackGenericService refuse_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HealthListener>> HealthListener::Start(const std::string& address,
                                                                      HealthBoard& board) {
  auto listener = std::make_unique<TcpHealthListener>(board);
  if (const absl::Status status = listener->Listen(address); !status.ok()) return status;
  return listener;
}

}  // namespace keepset::service
