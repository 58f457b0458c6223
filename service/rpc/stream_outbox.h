// What one CompressStream has to say and has not said yet: answers in order, and the credit that
// goes back to the client in batches. Not thread-safe: the stream's mutex guards it.
#ifndef KEEPSET_SERVICE_RPC_STREAM_OUTBOX_H_
#define KEEPSET_SERVICE_RPC_STREAM_OUTBOX_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "keepset/v1/compression.pb.h"

namespace keepset::service {

using ResponsePtr = std::unique_ptr<v1::StreamResponse>;

// An answer to operation `id` that says nothing yet.
ResponsePtr NewStreamResponse(uint64_t id);
ResponsePtr StreamErrorResponse(uint64_t id, const absl::Status& status);

class StreamOutbox {
 public:
  // `credits` layers may be under way to the server at a time; Start grants them. `on_change` (may
  // be nullptr) is told by how much what the client may send grows or shrinks; at the end by all of
  // it.
  explicit StreamOutbox(int64_t credits, std::function<void(int64_t change)> on_change = nullptr);
  ~StreamOutbox();
  StreamOutbox(const StreamOutbox&) = delete;
  StreamOutbox& operator=(const StreamOutbox&) = delete;

  void Start();

  void Push(ResponsePtr response);
  // nullptr when nothing waits.
  ResponsePtr Pop();
  // More waits for the client to read it than the server is willing to add to.
  bool full() const;

  // Takes the credit of one layer; false when the client has none left.
  [[nodiscard]] bool TakeCredit();
  // Gives back the credit of `layers`. The client hears of it when a batch is together: kNow says
  // that a message was pushed.
  enum class Grant { kLater, kNow };
  Grant ReturnCredit(int64_t layers);

 private:
  void PushGrant(int64_t layers);
  void Change(int64_t change);

  std::deque<ResponsePtr> waiting_;
  int64_t waiting_bytes_ = 0;
  const std::function<void(int64_t change)> on_change_;
  bool is_started_ = false;
  int64_t credit_;
  const int64_t batch_;
  int64_t returned_ = 0;  // not granted yet
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_STREAM_OUTBOX_H_
