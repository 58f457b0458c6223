#include "service/rpc/work_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"

namespace keepset::service {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// One worker that is held until Release, so that what waits meanwhile has an order.
class BusyQueue {
 public:
  explicit BusyQueue(int64_t capacity, int num_workers = 1)
      : queue_(WorkQueue::New(
            {.num_workers = num_workers, .capacity = capacity, .on_depth_change = {}},
            SystemClock())) {
    EXPECT_TRUE(queue_
                    ->Submit([this] {
                      busy_.Notify();
                      release_.WaitForNotification();
                    })
                    .ok());
    busy_.WaitForNotification();
  }
  ~BusyQueue() {
    if (queue_ != nullptr) Release();
  }
  WorkQueue& operator*() { return *queue_; }
  WorkQueue* operator->() { return queue_.get(); }
  WorkQueue::Task Note(std::string name) {
    return [this, name] { order_.push_back(name); };
  }
  // Runs everything; what was noted, in order.
  const std::vector<std::string>& Release() {
    release_.Notify();
    queue_.reset();
    return order_;
  }

 private:
  absl::Notification busy_;
  absl::Notification release_;
  std::vector<std::string> order_;
  std::unique_ptr<WorkQueue> queue_;
};

TEST(WorkQueue, RunsTasksInOrderOnOneWorker) {
  std::vector<int> order;
  {
    const auto queue =
        WorkQueue::New({.num_workers = 1, .capacity = 8, .on_depth_change = {}}, SystemClock());
    for (int i = 0; i < 5; ++i) {
      EXPECT_TRUE(queue->Submit([&order, i] { order.push_back(i); }).ok());
    }
  }
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3, 4}));
}

TEST(WorkQueue, FullQueueRefusesWithAHint) {
  BusyQueue queue(1);
  EXPECT_TRUE(queue->Submit([] {}).ok());
  const absl::Status refused = queue->Submit([] {});
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("retry in ~"));
  EXPECT_GE(queue->RetryHint(), absl::Milliseconds(1));
}

TEST(WorkQueue, ContinuationsAreNeverRefused) {
  absl::Notification busy;
  absl::Notification release;
  std::atomic<int> ran = 0;
  {
    const auto queue =
        WorkQueue::New({.num_workers = 1, .capacity = 1, .on_depth_change = {}}, SystemClock());
    queue->Continue([&] {
      busy.Notify();
      release.WaitForNotification();
    });
    busy.WaitForNotification();
    for (int i = 0; i < 3; ++i) queue->Continue([&] { ++ran; });
    EXPECT_EQ(queue->waiting(), 3);
    release.Notify();
  }
  EXPECT_EQ(ran, 3);
}

TEST(WorkQueue, FlowsTakeTurns) {
  BusyQueue queue(8);
  for (const std::string name : {"flood 1", "flood 2", "flood 3"}) {
    EXPECT_TRUE(queue->Submit({.owner = "flood"}, queue.Note(name)).ok());
  }
  EXPECT_TRUE(queue->Submit({.owner = "other"}, queue.Note("other 1")).ok());
  EXPECT_TRUE(queue->Submit({.owner = "flood", .size_class = 1}, queue.Note("large 1")).ok());
  EXPECT_THAT(queue.Release(), ElementsAre("flood 1", "other 1", "large 1", "flood 2", "flood 3"));
}

TEST(WorkQueue, WhatIsResumedIsTheNextOfItsFlow) {
  BusyQueue queue(8);
  const WorkQueue::Flow flow = {.owner = "a", .size_class = 1};
  EXPECT_TRUE(queue->Submit(flow, queue.Note("second")).ok());
  queue->Resume(flow, queue.Note("first"));
  queue->Continue(flow, queue.Note("third"));
  EXPECT_THAT(queue.Release(), ElementsAre("first", "second", "third"));
}

TEST(WorkQueue, AFloodLeavesRoomForTheFirstTaskOfOthers) {
  BusyQueue queue(2);
  EXPECT_TRUE(queue->Submit({.owner = "flood"}, [] {}).ok());
  EXPECT_TRUE(queue->Submit({.owner = "flood"}, [] {}).ok());
  EXPECT_EQ(queue->Submit({.owner = "flood"}, [] {}).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(queue->Submit({.owner = "other"}, [] {}).ok());
  EXPECT_EQ(queue->Submit({.owner = "other"}, [] {}).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(queue->waiting(), 3);
}

TEST(WorkQueue, TellsWhetherSmallerTasksWait) {
  BusyQueue queue(8);
  EXPECT_FALSE(queue->Waits(9));
  EXPECT_TRUE(queue->Submit({.owner = "a", .size_class = 1}, [] {}).ok());
  EXPECT_FALSE(queue->Waits(0));
  EXPECT_TRUE(queue->Waits(1));
}

TEST(WorkQueue, LendsOneSeatAtATime) {
  const auto queue =
      WorkQueue::New({.num_workers = 2, .capacity = 4, .on_depth_change = {}}, SystemClock());
  {
    const std::optional<WorkQueue::Seat> seat = queue->TakeSeat();
    EXPECT_TRUE(seat.has_value());
    EXPECT_FALSE(queue->TakeSeat().has_value());
  }
  EXPECT_TRUE(queue->TakeSeat().has_value());
}

TEST(WorkQueue, LendsNoSeatWhileEveryWorkerIsBusy) {
  BusyQueue queue(2);
  EXPECT_FALSE(queue->TakeSeat().has_value());
}

TEST(WorkQueue, LendsNoSeatWhileATaskWaits) {
  BusyQueue queue(4, 2);
  {
    const std::optional<WorkQueue::Seat> seat = queue->TakeSeat();
    ASSERT_TRUE(seat.has_value());
    EXPECT_TRUE(queue->Submit([] {}).ok());
    EXPECT_EQ(queue->waiting(), 1);  // the seat is the second worker's place
    EXPECT_FALSE(queue->TakeSeat().has_value());
  }
}

TEST(WorkQueue, ATaskThatWaitedForASeatRunsWhenItIsLeft) {
  const auto queue =
      WorkQueue::New({.num_workers = 1, .capacity = 4, .on_depth_change = {}}, SystemClock());
  absl::Notification ran;
  {
    const std::optional<WorkQueue::Seat> seat = queue->TakeSeat();
    ASSERT_TRUE(seat.has_value());
    EXPECT_TRUE(queue->Submit([&] { ran.Notify(); }).ok());
    EXPECT_FALSE(ran.HasBeenNotified());
  }
  EXPECT_TRUE(ran.WaitForNotificationWithTimeout(absl::Seconds(30)));
}

TEST(WorkQueue, TellsItsDepth) {
  std::vector<int64_t> depths;
  {
    const auto queue =
        WorkQueue::New({.num_workers = 1,
                        .capacity = 4,
                        .on_depth_change = [&](int64_t waiting) { depths.push_back(waiting); }},
                       SystemClock());
    EXPECT_TRUE(queue->Submit([] {}).ok());
  }
  EXPECT_EQ(depths, (std::vector<int64_t>{1, 0}));
}

}  // namespace
}  // namespace keepset::service
