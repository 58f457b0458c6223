#include "service/rpc/compression_service.h"

#include <utility>

#include "google/protobuf/arena.h"
#include "service/rpc/compress_reactor.h"
#include "service/rpc/compress_stream_reactor.h"
#include "service/rpc/requirements.h"
#include "service/rpc/wire_status.h"

namespace keepset::service {
namespace {

// A first block that holds the messages of a small operation without asking malloc again.
constexpr size_t kArenaStartBytes = 16384;

class ArenaMessages final : public grpc::MessageHolder<v1::CompressRequest, v1::CompressResponse> {
 public:
  ArenaMessages() : arena_(Options()) {
    set_request(google::protobuf::Arena::CreateMessage<v1::CompressRequest>(&arena_));
    set_response(google::protobuf::Arena::CreateMessage<v1::CompressResponse>(&arena_));
  }
  void Release() override { delete this; }

 private:
  static google::protobuf::ArenaOptions Options() {
    google::protobuf::ArenaOptions options;
    options.start_block_size = kArenaStartBytes;
    return options;
  }
  google::protobuf::Arena arena_;
};

class ArenaAllocator final
    : public grpc::MessageAllocator<v1::CompressRequest, v1::CompressResponse> {
 public:
  grpc::MessageHolder<v1::CompressRequest, v1::CompressResponse>* AllocateMessages() override {
    return new ArenaMessages;
  }
};

class CompressionServiceImpl final : public CompressionService {
 public:
  explicit CompressionServiceImpl(const ServiceContext& context) : context_(context) {
    SetMessageAllocatorFor_Compress(&allocator_);
  }

  grpc::ServerUnaryReactor* Compress(grpc::CallbackServerContext* call,
                                     const v1::CompressRequest* request,
                                     v1::CompressResponse* response) override {
    return StartCompress(context_, *call, *request, *response);
  }

  grpc::ServerBidiReactor<v1::StreamRequest, v1::StreamResponse>* CompressStream(
      grpc::CallbackServerContext* call) override {
    return StartCompressStream(context_, *call, streams_);
  }

  grpc::ServerUnaryReactor* GetRequirements(grpc::CallbackServerContext* call,
                                            const v1::GetRequirementsRequest* request,
                                            v1::GetRequirementsResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    const absl::Status status = DescribeRequirements(context_, *request, *response);
    reactor->Finish(
        ToGrpcStatus(status.ok() ? status : PublicStatus(status, context_.correlation_ids.Next())));
    return reactor;
  }

  void CloseStreams() override { streams_.CloseAll(); }

 private:
  const ServiceContext context_;
  ArenaAllocator allocator_;
  OpenStreams streams_;
};

}  // namespace

std::unique_ptr<CompressionService> CompressionService::New(const ServiceContext& context) {
  return std::make_unique<CompressionServiceImpl>(context);
}

}  // namespace keepset::service
