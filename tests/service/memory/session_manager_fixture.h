// A session manager of memfd regions, its clock and what it reported.
#ifndef KEEPSET_TESTS_SERVICE_MEMORY_SESSION_MANAGER_FIXTURE_H_
#define KEEPSET_TESTS_SERVICE_MEMORY_SESSION_MANAGER_FIXTURE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "service/memory/session_manager.h"
#include "tests/fakes/fake_clock.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service::testing {

class SessionManagerTest : public ::testing::Test {
 protected:
  explicit SessionManagerTest(const SessionLimits& limits = SessionLimits())
      : sessions_(SessionManager::New(
            limits, NewBuiltinTransports([](absl::string_view kind) { return kind == "memfd"; }),
            clock_, &observer_)) {}

  SessionInfo Open(char uuid) {
    auto info = sessions_->OpenSession(ArgsOf(uuid));
    EXPECT_TRUE(info.ok()) << info.status();
    return info.value_or(SessionInfo());
  }

  absl::StatusOr<RegionInfo> Register(const std::string& session_id, const std::string& name,
                                      uint64_t pages = 1) {
    const uint64_t bytes = pages * PageBytes();
    const auto token = sessions_->DepositFd(session_id, NewMemfd("keepset-" + name, bytes));
    if (!token.ok()) return token.status();
    return sessions_->RegisterRegion(session_id, name, *token, Whole("memfd", bytes));
  }

  std::string MustRegister(const std::string& session_id, const std::string& name) {
    const auto region = Register(session_id, name);
    EXPECT_TRUE(region.ok()) << region.status();
    return region.ok() ? region->region_id : "";
  }

  RegionLease MustLease(const std::string& session_id, const std::string& region_id) {
    auto lease = sessions_->Lease(session_id, region_id);
    EXPECT_TRUE(lease.ok()) << lease.status();
    return lease.ok() ? *std::move(lease) : RegionLease();
  }

  fakes::FakeClock clock_;
  RecordingObserver observer_;
  std::unique_ptr<SessionManager> sessions_;
};

}  // namespace keepset::service::testing

#endif  // KEEPSET_TESTS_SERVICE_MEMORY_SESSION_MANAGER_FIXTURE_H_
