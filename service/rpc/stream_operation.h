// One operation of a CompressStream and what its messages have brought so far.
#ifndef KEEPSET_SERVICE_RPC_STREAM_OPERATION_H_
#define KEEPSET_SERVICE_RPC_STREAM_OPERATION_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "keepset/v1/compression.pb.h"
#include "service/rpc/operation_call.h"
#include "service/rpc/work_queue.h"

namespace keepset::service {

using RequestPtr = std::unique_ptr<v1::StreamRequest>;

// While `scheduled`, a strand owns `call` (all but LeaseLayer, which
// is the reader's) and ends it; else whoever removes the operation from the open ones ends it.
struct StreamOperation {
  StreamOperation(const ServiceContext& context, const CallInfo& info, RequestPtr message)
      : id(message->operation_id()),
        begin(std::move(message)),
        call(context, info, begin->begin()) {}

  const uint64_t id;
  const RequestPtr begin;
  OperationCall call;
  WorkQueue::Flow flow;          // from admission on
  bool is_short = false;         // from admission on: the reader may run its strand
  std::vector<RequestPtr> kept;  // strand only: layers that gathering reads again

  // Under the stream's mutex. An empty pointer stands for Begin.
  std::deque<RequestPtr> pending;
  bool scheduled = false;
  bool end_received = false;
  int64_t refused_after_end = 0;  // messages that are answered behind the operation itself
  absl::Status dropped;           // not OK: removed from the open operations, and why
};
using OperationPtr = std::shared_ptr<StreamOperation>;

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_STREAM_OPERATION_H_
