#include "service/rpc/stream_outbox.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/text.h"

namespace keepset::service {
namespace {

// Answers that wait for a client to read them before the server stops reading from it.
constexpr int64_t kMaxWaitingBytes = int64_t{4} << 20;
// A message may quote what the client sent.
constexpr size_t kMaxErrorBytes = 4096;

int64_t BytesOf(const v1::StreamResponse& response) {
  return static_cast<int64_t>(response.ByteSizeLong() + sizeof(response));
}

}  // namespace

ResponsePtr NewStreamResponse(uint64_t id) {
  auto response = std::make_unique<v1::StreamResponse>();
  response->set_operation_id(id);
  return response;
}

ResponsePtr StreamErrorResponse(uint64_t id, const absl::Status& status) {
  auto response = NewStreamResponse(id);
  response->mutable_error()->set_code(static_cast<int32_t>(status.code()));
  response->mutable_error()->set_message(ToText(status.message(), kMaxErrorBytes));
  return response;
}

StreamOutbox::StreamOutbox(int64_t credits, std::function<void(int64_t change)> on_change)
    : on_change_(std::move(on_change)),
      credit_(credits),
      batch_(std::max<int64_t>(1, credits / 4)) {}

StreamOutbox::~StreamOutbox() { Change(-credit_); }

void StreamOutbox::Start() {
  is_started_ = true;
  Change(credit_);
  PushGrant(credit_);
}

void StreamOutbox::Change(int64_t change) {
  if (is_started_ && on_change_ != nullptr) on_change_(change);
}

void StreamOutbox::Push(ResponsePtr response) {
  waiting_bytes_ += BytesOf(*response);
  waiting_.push_back(std::move(response));
}

ResponsePtr StreamOutbox::Pop() {
  if (waiting_.empty()) return nullptr;
  ResponsePtr response = std::move(waiting_.front());
  waiting_.pop_front();
  waiting_bytes_ -= BytesOf(*response);
  return response;
}

bool StreamOutbox::full() const { return waiting_bytes_ > kMaxWaitingBytes; }

bool StreamOutbox::TakeCredit() {
  if (credit_ <= 0) return false;
  --credit_;
  Change(-1);
  return true;
}

StreamOutbox::Grant StreamOutbox::ReturnCredit(int64_t layers) {
  returned_ += layers;
  if (returned_ < batch_) return Grant::kLater;
  credit_ += returned_;
  Change(returned_);
  PushGrant(returned_);
  returned_ = 0;
  return Grant::kNow;
}

void StreamOutbox::PushGrant(int64_t layers) {
  auto response = std::make_unique<v1::StreamResponse>();
  response->mutable_credit()->set_layer_inputs(static_cast<uint32_t>(layers));
  Push(std::move(response));
}

}  // namespace keepset::service
