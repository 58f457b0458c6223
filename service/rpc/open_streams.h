// The CompressStreams of a server, so that its end can end them.
#ifndef KEEPSET_SERVICE_RPC_OPEN_STREAMS_H_
#define KEEPSET_SERVICE_RPC_OPEN_STREAMS_H_

#include <functional>
#include <list>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace keepset::service {

// The streams that are open now. Thread-safe.
class OpenStreams {
 public:
  using Closer = std::function<void()>;

  OpenStreams() = default;
  OpenStreams(const OpenStreams&) = delete;
  OpenStreams& operator=(const OpenStreams&) = delete;
  // Waits until every stream was removed.
  ~OpenStreams();

  // `closer` is called by CloseAll; at once when that has happened already.
  std::list<Closer>::iterator Add(const Closer& closer);
  void Remove(std::list<Closer>::iterator stream);
  void CloseAll();

 private:
  absl::Mutex mutex_;
  std::list<Closer> closers_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_OPEN_STREAMS_H_
