#include "service/rpc/admission.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace keepset::service {
namespace {

TEST(Admission, CountsTickets) {
  std::vector<int64_t> seen;
  Admission admission([&](int64_t running) { seen.push_back(running); });
  {
    absl::StatusOr<Admission::Ticket> ticket = admission.Enter();
    ASSERT_TRUE(ticket.ok());
    const Admission::Ticket moved = *std::move(ticket);
    EXPECT_EQ(admission.running(), 1);
  }
  EXPECT_EQ(admission.running(), 0);
  EXPECT_EQ(seen, (std::vector<int64_t>{1, 0}));
}

TEST(Admission, RefusesWhileDraining) {
  Admission admission(nullptr);
  admission.StartDraining();
  EXPECT_EQ(admission.Enter().status().code(), absl::StatusCode::kUnavailable);
}

TEST(Admission, WaitsForTheLastTicket) {
  Admission admission(nullptr);
  absl::StatusOr<Admission::Ticket> ticket = admission.Enter();
  ASSERT_TRUE(ticket.ok());
  EXPECT_FALSE(admission.WaitIdle(absl::Milliseconds(1)));
  std::thread last([held = *std::move(ticket)]() mutable { held = Admission::Ticket(); });
  EXPECT_TRUE(admission.WaitIdle(absl::Seconds(30)));
  last.join();
}

}  // namespace
}  // namespace keepset::service
