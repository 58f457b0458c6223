// The unary Compress: one operation, all layers in one message.
#ifndef KEEPSET_SERVICE_RPC_COMPRESS_REACTOR_H_
#define KEEPSET_SERVICE_RPC_COMPRESS_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "keepset/v1/compression.pb.h"
#include "service/rpc/operation_call.h"
#include "service/rpc/service_context.h"

namespace keepset::service {

// The reactor deletes itself when the call is done. `context` must outlive it.
grpc::ServerUnaryReactor* StartCompress(const ServiceContext& context,
                                        grpc::CallbackServerContext& call,
                                        const v1::CompressRequest& request,
                                        v1::CompressResponse& response);

// With the trace context of the call's metadata, when there is exactly one and it is valid.
CallInfo CallInfoOf(const char* method, const grpc::CallbackServerContext& call);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_COMPRESS_REACTOR_H_
