#include "service/rpc/work_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "absl/synchronization/notification.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;

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
  absl::Notification busy;
  absl::Notification release;
  const auto queue =
      WorkQueue::New({.num_workers = 1, .capacity = 1, .on_depth_change = {}}, SystemClock());
  ASSERT_TRUE(queue
                  ->Submit([&] {
                    busy.Notify();
                    release.WaitForNotification();
                  })
                  .ok());
  busy.WaitForNotification();
  EXPECT_TRUE(queue->Submit([] {}).ok());
  const absl::Status refused = queue->Submit([] {});
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("retry in ~"));
  EXPECT_GE(queue->RetryHint(), absl::Milliseconds(1));
  release.Notify();
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
