#include "service/rpc/open_streams.h"

namespace keepset::service {

OpenStreams::~OpenStreams() {
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(&closers_, &std::list<Closer>::empty));
}

std::list<OpenStreams::Closer>::iterator OpenStreams::Add(const Closer& closer) {
  bool closed = false;
  std::list<Closer>::iterator stream;
  {
    absl::MutexLock lock(&mutex_);
    stream = closers_.insert(closers_.end(), closer);
    closed = closed_;
  }
  if (closed) closer();
  return stream;
}

void OpenStreams::Remove(std::list<Closer>::iterator stream) {
  absl::MutexLock lock(&mutex_);
  closers_.erase(stream);
}

void OpenStreams::CloseAll() {
  std::list<Closer> closers;
  {
    absl::MutexLock lock(&mutex_);
    closed_ = true;
    closers = closers_;
  }
  for (const Closer& close : closers) close();
}

}  // namespace keepset::service
