// Regions of the server's own memory: what a worker gets, limits, whom a token serves.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/memory/session_manager.h"
#include "tests/service/memory/memory_test_support.h"
#include "tests/service/memory/session_manager_fixture.h"

namespace keepset::service {
namespace {

using ::testing::HasSubstr;
using testing::PageBytes;
using testing::SessionManagerTest;

// A worker's mapping of a descriptor.
class Mapping {
 public:
  Mapping(int fd, size_t bytes)
      : bytes_(bytes), data_(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) {}
  ~Mapping() {
    if (data_ != MAP_FAILED) ::munmap(data_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool valid() const { return data_ != MAP_FAILED; }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  const size_t bytes_;
  void* const data_;
};

class OwnedRegionTest : public SessionManagerTest {
 protected:
  explicit OwnedRegionTest(const SessionLimits& limits = SessionLimits())
      : SessionManagerTest(limits) {}

  absl::StatusOr<AllocatedRegion> Allocate(const SessionInfo& session, const std::string& name,
                                           uint64_t length) {
    return sessions_->AllocateRegion(session.session_id, name, "memfd", length, "");
  }
  uint64_t OwnedBytes() const { return sessions_->Counts().regions.at(0).owned_bytes; }
};

TEST_F(OwnedRegionTest, WorkerAndServerSeeTheSameZeros) {
  const SessionInfo session = Open('a');
  const auto region = Allocate(session, "out", PageBytes());
  ASSERT_TRUE(region.ok()) << region.status();
  const auto fd = sessions_->FetchFd(session.session_id, region->fd_token);
  ASSERT_TRUE(fd.ok()) << fd.status();
  const Mapping worker(fd->get(), region->info.owned_bytes);
  ASSERT_TRUE(worker.valid());
  EXPECT_TRUE(std::all_of(worker.data(), worker.data() + PageBytes(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
  const RegionLease lease = MustLease(session.session_id, region->info.region_id);
  EXPECT_EQ(lease.region().access(), RegionAccess::kReadWrite);
  lease.region().data()[7] = std::byte{42};
  EXPECT_EQ(worker.data()[7], std::byte{42});
}

TEST_F(OwnedRegionTest, AWorkerCanNeitherResizeNorSealTheMemory) {
  const SessionInfo session = Open('a');
  const auto region = Allocate(session, "out", PageBytes());
  ASSERT_TRUE(region.ok()) << region.status();
  const auto fd = sessions_->FetchFd(session.session_id, region->fd_token);
  ASSERT_TRUE(fd.ok()) << fd.status();
  EXPECT_NE(::ftruncate(fd->get(), 0), 0);
  EXPECT_NE(::ftruncate(fd->get(), static_cast<off_t>(2 * PageBytes())), 0);
  EXPECT_NE(::fcntl(fd->get(), F_ADD_SEALS, F_SEAL_WRITE), 0);
}

TEST_F(OwnedRegionTest, TheAllocationIsWholePages) {
  const SessionInfo session = Open('a');
  const auto region = Allocate(session, "out", PageBytes() + 1);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->info.owned_bytes, 2 * PageBytes());
  EXPECT_EQ(MustLease(session.session_id, region->info.region_id).region().size_bytes(),
            static_cast<int64_t>(PageBytes() + 1));
}

TEST_F(OwnedRegionTest, EveryRegionHasItsOwnGeneration) {
  const SessionInfo session = Open('a');
  const auto first = Allocate(session, "one", 1);
  const auto second = Allocate(session, "two", 1);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_NE(first->info.generation, second->info.generation);
}

TEST_F(OwnedRegionTest, ItIsListedLikeARegisteredRegion) {
  const SessionInfo session = Open('a');
  ASSERT_TRUE(Allocate(session, "out", 5).ok());
  const auto regions = sessions_->ListRegions(session.session_id);
  ASSERT_TRUE(regions.ok());
  ASSERT_EQ(regions->size(), 1u);
  EXPECT_EQ(regions->front().name, "out");
  EXPECT_EQ(regions->front().length, 5u);
  EXPECT_EQ(sessions_->Counts().regions.at(0).regions, 1);
}

TEST_F(OwnedRegionTest, ADescriptorIsAnsweredOnce) {
  const SessionInfo session = Open('a');
  const auto region = Allocate(session, "out", 1);
  ASSERT_TRUE(region.ok());
  EXPECT_TRUE(sessions_->FetchFd(session.session_id, region->fd_token).ok());
  EXPECT_EQ(sessions_->FetchFd(session.session_id, region->fd_token).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(OwnedRegionTest, ATokenServesNoOtherSession) {
  const SessionInfo mine = Open('a');
  const SessionInfo other = Open('b');
  const auto region = Allocate(mine, "out", 1);
  ASSERT_TRUE(region.ok());
  EXPECT_EQ(sessions_->FetchFd(other.session_id, region->fd_token).status(),
            sessions_->FetchFd(other.session_id, region->fd_token + 1).status());
  EXPECT_TRUE(sessions_->FetchFd(mine.session_id, region->fd_token).ok());
}

TEST_F(OwnedRegionTest, ATokenOfAPassedDescriptorIsNoneToFetch) {
  const SessionInfo session = Open('a');
  const auto token = sessions_->DepositFd(session.session_id, testing::NewMemfd("k", 1));
  ASSERT_TRUE(token.ok());
  EXPECT_EQ(sessions_->FetchFd(session.session_id, *token).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(OwnedRegionTest, NoOtherSessionUsesTheRegion) {
  const SessionInfo mine = Open('a');
  const SessionInfo other = Open('b');
  const auto region = Allocate(mine, "out", 1);
  ASSERT_TRUE(region.ok());
  EXPECT_EQ(sessions_->Lease(other.session_id, region->info.region_id).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(sessions_->RetireRegion(other.session_id, region->info.region_id, absl::ZeroDuration())
                .code(),
            absl::StatusCode::kNotFound);
}

TEST_F(OwnedRegionTest, UnfetchedDescriptorsEndWithTheSession) {
  const SessionInfo session = Open('a');
  const int64_t before = testing::CountOpenFds();
  ASSERT_TRUE(Allocate(session, "out", 1).ok());
  EXPECT_GT(testing::CountOpenFds(), before);
  ASSERT_TRUE(sessions_->CloseSession(session.session_id).ok());
  EXPECT_EQ(testing::CountOpenFds(), before);
}

TEST_F(OwnedRegionTest, ARetireDropsTheUnfetchedDescriptor) {
  const SessionInfo session = Open('a');
  const int64_t before = testing::CountOpenFds();
  const auto region = Allocate(session, "out", 1);
  ASSERT_TRUE(region.ok());
  ASSERT_TRUE(
      sessions_->RetireRegion(session.session_id, region->info.region_id, absl::ZeroDuration())
          .ok());
  EXPECT_EQ(testing::CountOpenFds(), before);
  EXPECT_EQ(sessions_->FetchFd(session.session_id, region->fd_token).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(OwnedRegionTest, UnfetchedDescriptorsAreBounded) {
  const SessionInfo session = Open('a');
  absl::Status last;
  int taken = 0;
  while ((last = Allocate(session, absl::StrCat("r", taken), 1).status()).ok() && taken < 1000) {
    ++taken;
  }
  EXPECT_EQ(taken, 64);
  EXPECT_EQ(last.code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(OwnedRegionTest, RetireGivesTheMemoryBack) {
  const SessionInfo session = Open('a');
  const auto region = Allocate(session, "out", PageBytes());
  ASSERT_TRUE(region.ok());
  EXPECT_EQ(OwnedBytes(), PageBytes());
  EXPECT_TRUE(
      sessions_->RetireRegion(session.session_id, region->info.region_id, absl::ZeroDuration())
          .ok());
  EXPECT_EQ(OwnedBytes(), 0u);
  EXPECT_FALSE(testing::IsMapped("keepset-owned"));
}

TEST_F(OwnedRegionTest, ARetireWaitsForTheOperationThatHoldsIt) {
  const SessionInfo session = Open('a');
  const auto region = Allocate(session, "out", PageBytes());
  ASSERT_TRUE(region.ok());
  const std::string& id = region->info.region_id;
  {
    const RegionLease lease = MustLease(session.session_id, id);
    EXPECT_EQ(sessions_->RetireRegion(session.session_id, id, absl::ZeroDuration()).code(),
              absl::StatusCode::kDeadlineExceeded);
    EXPECT_EQ(OwnedBytes(), PageBytes());
  }
  EXPECT_EQ(OwnedBytes(), 0u);
}

TEST_F(OwnedRegionTest, NoBytesAreRefused) {
  const SessionInfo session = Open('a');
  EXPECT_EQ(Allocate(session, "out", 0).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(OwnedRegionTest, LengthsThatWrapAreRefused) {
  const SessionInfo session = Open('a');
  for (const uint64_t length : {~uint64_t{0}, uint64_t{1} << 63, (uint64_t{1} << 62) + 1}) {
    EXPECT_EQ(Allocate(session, "out", length).status().code(), absl::StatusCode::kInvalidArgument)
        << length;
  }
  EXPECT_EQ(Allocate(session, "out", uint64_t{1} << 62).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(OwnedRegionTest, AHostKindOnADeviceIsRefusedAndTakesNothing) {
  const SessionInfo session = Open('a');
  EXPECT_EQ(
      sessions_->AllocateRegion(session.session_id, "out", "memfd", 1, "GPU-0").status().code(),
      absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(OwnedBytes(), 0u);
  EXPECT_TRUE(Allocate(session, "out", 1).ok()) << "the name is free";
}

TEST_F(OwnedRegionTest, AServerWithoutADeviceRefusesInTheWordsOfRegistration) {
  const SessionInfo session = Open('a');
  const absl::Status allocated =
      sessions_->AllocateRegion(session.session_id, "out", "cuda_ipc", 1, "GPU-0").status();
  EXPECT_EQ(allocated.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(allocated, sessions_
                           ->RegisterRegion(session.session_id, "out", 0,
                                            testing::Whole("cuda_ipc", PageBytes()))
                           .status());
}

TEST_F(OwnedRegionTest, AnUnknownSessionGetsNothing) {
  EXPECT_EQ(sessions_->AllocateRegion("nobody", "out", "memfd", 1, "").status().code(),
            absl::StatusCode::kNotFound);
}

class SmallOwnedLimits : public OwnedRegionTest {
 protected:
  SmallOwnedLimits()
      : OwnedRegionTest({.max_regions_per_session = 3,
                         .max_owned_bytes = 3 * PageBytes(),
                         .max_owned_bytes_per_session = 2 * PageBytes()}) {}
};

TEST_F(SmallOwnedLimits, TheSessionsLimitIsNamed) {
  const SessionInfo session = Open('a');
  ASSERT_TRUE(Allocate(session, "one", PageBytes()).ok());
  const absl::Status status = Allocate(session, "two", PageBytes() + 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("memory.max_owned_bytes_per_session"));
}

TEST_F(SmallOwnedLimits, TheServersLimitIsNamed) {
  ASSERT_TRUE(Allocate(Open('a'), "one", 2 * PageBytes()).ok());
  const absl::Status status = Allocate(Open('b'), "one", 2 * PageBytes()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("memory.max_owned_bytes is"));
}

TEST_F(SmallOwnedLimits, RegionsCountAgainstTheSessionsQuota) {
  const SessionInfo session = Open('a');
  for (const char* const name : {"one", "two", "three"}) MustRegister(session.session_id, name);
  EXPECT_EQ(Allocate(session, "four", 1).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(OwnedBytes(), 0u);
}

TEST_F(SmallOwnedLimits, ANameIsUsedOnce) {
  const SessionInfo session = Open('a');
  ASSERT_TRUE(Allocate(session, "out", 1).ok());
  EXPECT_EQ(Allocate(session, "out", 1).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(OwnedBytes(), PageBytes());
}

class NoOwnedMemory : public OwnedRegionTest {
 protected:
  NoOwnedMemory() : OwnedRegionTest({.max_owned_bytes = 0, .max_owned_bytes_per_session = 0}) {}
};

TEST_F(NoOwnedMemory, TheKeyThatAllowsItIsNamed) {
  const absl::Status status = Allocate(Open('a'), "out", 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("memory.max_owned_bytes"));
}

}  // namespace
}  // namespace keepset::service
