// keepset.v1.CompressionService on the callback API: handlers check, lease and enqueue; the work
// queue's threads run operations and answer. Short operations are run by their handler.
#ifndef KEEPSET_SERVICE_RPC_COMPRESSION_SERVICE_H_
#define KEEPSET_SERVICE_RPC_COMPRESSION_SERVICE_H_

#include <memory>

#include "keepset/v1/compression.grpc.pb.h"
#include "service/rpc/service_context.h"

namespace keepset::service {

class CompressionService : public v1::CompressionService::CallbackService {
 public:
  // `context` is copied; what it refers to must outlive the service.
  static std::unique_ptr<CompressionService> New(const ServiceContext& context);

  // Ends every stream with UNAVAILABLE as soon as its open operations are answered; later streams
  // are refused.
  virtual void CloseStreams() = 0;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_COMPRESSION_SERVICE_H_
