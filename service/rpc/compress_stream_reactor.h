// The bidirectional CompressStream on the wire: one read and one write are outstanding, credit goes
// back in batches, and the stream ends when every operation it carries (stream_operations.h) is
// settled. An operation that fails is answered and forgotten; the stream goes on.
#ifndef KEEPSET_SERVICE_RPC_COMPRESS_STREAM_REACTOR_H_
#define KEEPSET_SERVICE_RPC_COMPRESS_STREAM_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "keepset/v1/compression.pb.h"
#include "service/rpc/open_streams.h"
#include "service/rpc/service_context.h"

namespace keepset::service {

// The reactor lives until the stream is done and no worker uses it. `context` and `streams` must
// outlive it.
grpc::ServerBidiReactor<v1::StreamRequest, v1::StreamResponse>* StartCompressStream(
    const ServiceContext& context, grpc::CallbackServerContext& call, OpenStreams& streams);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_COMPRESS_STREAM_REACTOR_H_
