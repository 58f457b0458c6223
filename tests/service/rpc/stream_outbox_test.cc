#include "service/rpc/stream_outbox.h"

#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace keepset::service {
namespace {

TEST(StreamOutbox, AnswersLeaveInTheOrderTheyCame) {
  StreamOutbox outbox(8);
  outbox.Push(NewStreamResponse(3));
  outbox.Push(StreamErrorResponse(4, absl::NotFoundError("gone")));
  EXPECT_EQ(outbox.Pop()->operation_id(), 3u);
  const ResponsePtr second = outbox.Pop();
  EXPECT_EQ(second->operation_id(), 4u);
  EXPECT_EQ(second->error().message(), "gone");
  EXPECT_EQ(outbox.Pop(), nullptr);
}

TEST(StreamErrorResponse, HoldsTextOfBoundedLength) {
  EXPECT_EQ(StreamErrorResponse(1, absl::NotFoundError("x\xff"))->error().message(), "x\\xff");
  std::string text;
  for (int i = 0; i < 10000; ++i) text += "é";
  const std::string message =
      StreamErrorResponse(1, absl::NotFoundError("a" + text))->error().message();
  EXPECT_LE(message.size(), 4096u);
  EXPECT_EQ(message, "a" + text.substr(0, message.size() - 1));
  EXPECT_EQ(message.size() % 2, 1u);
}

TEST(StreamOutbox, StartGrantsAllCredit) {
  StreamOutbox outbox(8);
  outbox.Start();
  EXPECT_EQ(outbox.Pop()->credit().layer_inputs(), 8u);
}

TEST(StreamOutbox, TellsWhatTheClientMaySend) {
  int64_t outstanding = 0;
  {
    StreamOutbox outbox(8, [&outstanding](int64_t change) { outstanding += change; });
    EXPECT_EQ(outstanding, 0);
    outbox.Start();
    EXPECT_EQ(outstanding, 8);
    ASSERT_TRUE(outbox.TakeCredit());
    ASSERT_TRUE(outbox.TakeCredit());
    EXPECT_EQ(outstanding, 6);
    // Not granted yet.
    EXPECT_EQ(outbox.ReturnCredit(1), StreamOutbox::Grant::kLater);
    EXPECT_EQ(outstanding, 6);
    EXPECT_EQ(outbox.ReturnCredit(1), StreamOutbox::Grant::kNow);
    EXPECT_EQ(outstanding, 8);
  }
  EXPECT_EQ(outstanding, 0);
}

TEST(StreamOutbox, CreditEnds) {
  StreamOutbox outbox(2);
  EXPECT_TRUE(outbox.TakeCredit());
  EXPECT_TRUE(outbox.TakeCredit());
  EXPECT_FALSE(outbox.TakeCredit());
}

TEST(StreamOutbox, ReturnedCreditIsGrantedByAQuarterAtATime) {
  StreamOutbox outbox(8);
  while (outbox.TakeCredit()) {
  }
  EXPECT_EQ(outbox.ReturnCredit(1), StreamOutbox::Grant::kLater);
  EXPECT_FALSE(outbox.TakeCredit());
  EXPECT_EQ(outbox.ReturnCredit(2), StreamOutbox::Grant::kNow);
  EXPECT_EQ(outbox.Pop()->credit().layer_inputs(), 3u);
  EXPECT_TRUE(outbox.TakeCredit());
}

TEST(StreamOutbox, IsFullUntilTheClientReads) {
  StreamOutbox outbox(1);
  ResponsePtr large = NewStreamResponse(1);
  large->mutable_result()->set_backend(std::string(5 << 20, 'x'));
  outbox.Push(std::move(large));
  EXPECT_TRUE(outbox.full());
  outbox.Pop();
  EXPECT_FALSE(outbox.full());
}

}  // namespace
}  // namespace keepset::service
