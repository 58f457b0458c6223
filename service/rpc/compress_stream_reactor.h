// The bidirectional CompressStream: many operations on one stream.
//
// Layers of one operation are worked on in order by one worker at a time (its strand); different
// operations run in parallel. One read and one write are outstanding. An operation that fails is
// answered and forgotten; the stream goes on.
#ifndef KEEPSET_SERVICE_RPC_COMPRESS_STREAM_REACTOR_H_
#define KEEPSET_SERVICE_RPC_COMPRESS_STREAM_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <list>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "keepset/v1/compression.pb.h"
#include "service/rpc/service_context.h"

namespace keepset::service {

// The streams that are open now. Thread-safe.
class OpenStreams {
 public:
  using Closer = std::function<void()>;

  // `closer` is called by CloseAll; at once when that has happened already.
  std::list<Closer>::iterator Add(Closer closer);
  void Remove(std::list<Closer>::iterator stream);
  void CloseAll();

 private:
  absl::Mutex mutex_;
  std::list<Closer> closers_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
};

// The reactor lives until the stream is done and no worker uses it. `context` and `streams` must
// outlive it.
grpc::ServerBidiReactor<v1::StreamRequest, v1::StreamResponse>* StartCompressStream(
    const ServiceContext& context, grpc::CallbackServerContext& call, OpenStreams& streams);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_COMPRESS_STREAM_REACTOR_H_
