// What every line of transports.def owes: bounds, descriptors, access, life of the mapping.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "service/memory/memory_transport.h"
#include "service/memory/session_manager.h"
#include "tests/service/memory/memory_test_support.h"

namespace keepset::service {
namespace {

using testing::NewMemfd;
using testing::PageBytes;
using testing::Seal;
using testing::Whole;

// Of host memory; the ones of device memory owe the same in cuda_transport_test.cc, where a driver
// is.
bool IsHostKind(absl::string_view kind) { return !absl::StartsWith(kind, "cuda_"); }

std::vector<std::string> AllKinds() {
  std::vector<std::string> kinds;
  for (const auto& transport : NewBuiltinTransports(IsHostKind)) {
    kinds.emplace_back(transport->kind());
  }
  return kinds;
}

std::unique_ptr<MemoryTransport> TransportOf(absl::string_view kind) {
  return std::move(NewBuiltinTransports([&](absl::string_view k) { return k == kind; }).at(0));
}

// A memory object of the kind under test, as a client would make it. A new kind adds a branch to
// the constructor and to Describe.
class ClientMemory {
 public:
  ClientMemory(absl::string_view kind, uint64_t bytes) : kind_(kind), bytes_(bytes) {
    if (kind == "memfd") {
      fd_ = NewMemfd("keepset-conformance", bytes);
    } else if (kind == "posix_shm") {
      shm_name_ = absl::StrCat("/keepset-conformance-", ::getpid());
      fd_.Reset(::shm_open(shm_name_.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
      if (!fd_.valid() || ::ftruncate(fd_.get(), static_cast<off_t>(bytes)) != 0) fd_.Reset();
    }
  }
  ~ClientMemory() {
    if (!shm_name_.empty()) ::shm_unlink(shm_name_.c_str());
  }

  bool valid() const { return fd_.valid(); }

  RegionDescriptor Describe() const {
    RegionDescriptor descriptor = Whole(kind_, bytes_);
    if (kind_ == "memfd") {
      descriptor.fd.Reset(::fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
    } else {
      descriptor.name = shm_name_;
    }
    return descriptor;
  }

  void Write(uint64_t at, char value) {
    ASSERT_EQ(::pwrite(fd_.get(), &value, 1, static_cast<off_t>(at)), 1);
  }
  char Read(uint64_t at) const {
    char value = 0;
    EXPECT_EQ(::pread(fd_.get(), &value, 1, static_cast<off_t>(at)), 1);
    return value;
  }
  bool Truncate(uint64_t bytes) { return ::ftruncate(fd_.get(), static_cast<off_t>(bytes)) == 0; }
  void Drop() { fd_.Reset(); }

 private:
  std::string kind_;
  uint64_t bytes_;
  std::string shm_name_;
  UniqueFd fd_;
};

class TransportConformance : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    ASSERT_TRUE(memory_.valid()) << "ClientMemory does not know how to make " << GetParam();
  }

  uint64_t bytes_ = 4 * PageBytes();
  ClientMemory memory_{GetParam(), bytes_};
  std::unique_ptr<MemoryTransport> transport_ = TransportOf(GetParam());

  absl::StatusCode OpenCode(RegionDescriptor descriptor) {
    return transport_->Open(std::move(descriptor)).status().code();
  }
};

TEST_P(TransportConformance, MapsWhatTheClientWrote) {
  memory_.Write(PageBytes() + 7, 'k');
  const auto region = transport_->Open(memory_.Describe());
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ((*region)->size_bytes(), static_cast<int64_t>(bytes_));
  EXPECT_EQ(static_cast<char>((*region)->data()[PageBytes() + 7]), 'k');
}

TEST_P(TransportConformance, MapsThePartAtAnOffset) {
  memory_.Write(2 * PageBytes(), 'o');
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.offset = 2 * PageBytes();
  descriptor.length = PageBytes() + 1;
  const auto region = transport_->Open(std::move(descriptor));
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ((*region)->size_bytes(), static_cast<int64_t>(PageBytes() + 1));
  EXPECT_EQ(static_cast<char>((*region)->data()[0]), 'o');
}

TEST_P(TransportConformance, ReadWriteRegionReachesTheClient) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.access = RegionAccess::kReadWrite;
  const auto region = transport_->Open(std::move(descriptor));
  ASSERT_TRUE(region.ok()) << region.status();
  (*region)->data()[3] = std::byte{'w'};
  EXPECT_EQ(memory_.Read(3), 'w');
}

TEST_P(TransportConformance, RefusesARangeBeyondTheObject) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.offset = PageBytes();
  EXPECT_EQ(OpenCode(std::move(descriptor)), absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, RefusesAnOffsetPlusLengthThatWraps) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.offset = PageBytes();
  descriptor.length = std::numeric_limits<uint64_t>::max() - PageBytes() + 1;
  EXPECT_EQ(OpenCode(std::move(descriptor)), absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, RefusesAnOffsetBeyondTheObject) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.offset = uint64_t{0} - PageBytes();
  EXPECT_EQ(OpenCode(std::move(descriptor)), absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, RefusesAnOffsetOffThePage) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.offset = 64;
  descriptor.length = 64;
  EXPECT_EQ(OpenCode(std::move(descriptor)), absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, RefusesAnEmptyRegion) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.length = 0;
  EXPECT_EQ(OpenCode(std::move(descriptor)), absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, RefusesAnotherSizeThanTheObjectHas) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.allocation_bytes += PageBytes();
  const absl::Status status = transport_->Open(std::move(descriptor)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(status.message(), absl::StrCat(bytes_))) << status;
}

TEST_P(TransportConformance, RefusesADeviceUuid) {
  RegionDescriptor descriptor = memory_.Describe();
  descriptor.device_uuid = "GPU-0";
  EXPECT_EQ(OpenCode(std::move(descriptor)), absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, RefusesADescriptorThatNamesNothing) {
  RegionDescriptor descriptor = Whole(GetParam(), bytes_);
  EXPECT_EQ(OpenCode(std::move(descriptor)), absl::StatusCode::kInvalidArgument);
}

TEST_P(TransportConformance, VerifyAcceptsUnchangedMemory) {
  const auto region = transport_->Open(memory_.Describe());
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_TRUE((*region)->Verify().ok());
}

TEST_P(TransportConformance, TruncationIsImpossibleOrSeenByVerify) {
  const auto region = transport_->Open(memory_.Describe());
  ASSERT_TRUE(region.ok()) << region.status();
  const bool truncated = memory_.Truncate(PageBytes());
  EXPECT_EQ((*region)->Verify().ok(), !truncated);
}

TEST_P(TransportConformance, MappingOutlivesTheClientsObject) {
  memory_.Write(0, 'l');
  const auto region = transport_->Open(memory_.Describe());
  ASSERT_TRUE(region.ok()) << region.status();
  memory_.Drop();
  EXPECT_EQ(static_cast<char>((*region)->data()[0]), 'l');
}

TEST_P(TransportConformance, RefusedAndClosedRegionsHoldNoDescriptor) {
  const int64_t before = testing::CountOpenFds();
  for (int i = 0; i < 50; ++i) {
    RegionDescriptor bad = memory_.Describe();
    bad.length += 1;
    EXPECT_FALSE(transport_->Open(std::move(bad)).ok());
    EXPECT_TRUE(transport_->Open(memory_.Describe()).ok());
  }
  EXPECT_EQ(testing::CountOpenFds(), before);
}

INSTANTIATE_TEST_SUITE_P(Transports, TransportConformance, ::testing::ValuesIn(AllKinds()),
                         [](const auto& info) { return info.param; });

TEST(BuiltinTransports, AreThoseTheFilterAccepts) {
  const auto transports =
      NewBuiltinTransports([](absl::string_view kind) { return kind == "memfd"; });
  ASSERT_EQ(transports.size(), 1u);
  EXPECT_EQ(transports[0]->kind(), "memfd");
}

absl::Status OpenMemfd(UniqueFd fd, uint64_t bytes, RegionAccess access = RegionAccess::kReadOnly) {
  RegionDescriptor descriptor = Whole("memfd", bytes);
  descriptor.fd = std::move(fd);
  descriptor.access = access;
  return TransportOf("memfd")->Open(std::move(descriptor)).status();
}

TEST(MemfdTransport, RefusesAnUnsealedMemfdAndSaysHowToSeal) {
  const absl::Status status = OpenMemfd(NewMemfd("k", PageBytes(), Seal::kNone), PageBytes());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(status.message(), "F_ADD_SEALS")) << status;
}

TEST(MemfdTransport, RefusesAFileOnDisk) {
  testing::TemporaryDirectory directory;
  UniqueFd file(::open(directory.File("plain").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), static_cast<off_t>(PageBytes())), 0);
  EXPECT_EQ(OpenMemfd(std::move(file), PageBytes()).code(), absl::StatusCode::kInvalidArgument);
}

TEST(MemfdTransport, RefusesReservedHugePages) {
  UniqueFd fd(::memfd_create("k", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB));
  if (!fd.valid()) GTEST_SKIP() << "this kernel makes no memfd of huge pages";
  constexpr uint64_t kHugePageBytes = uint64_t{1} << 30;  // A multiple of every huge page size.
  ASSERT_EQ(::ftruncate(fd.get(), static_cast<off_t>(kHugePageBytes)), 0);
  ASSERT_EQ(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  const absl::Status status = OpenMemfd(std::move(fd), kHugePageBytes);
  EXPECT_TRUE(absl::StrContains(status.message(), "huge pages")) << status;
}

TEST(MemfdTransport, RefusesAPipe) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const UniqueFd writer(ends[1]);
  EXPECT_EQ(OpenMemfd(UniqueFd(ends[0]), PageBytes()).code(), absl::StatusCode::kInvalidArgument);
}

TEST(MemfdTransport, RefusesWritingToWriteSealedMemory) {
  EXPECT_EQ(OpenMemfd(NewMemfd("k", PageBytes(), Seal::kShrinkAndWrite), PageBytes(),
                      RegionAccess::kReadWrite)
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(MemfdTransport, ReadsWriteSealedMemory) {
  EXPECT_TRUE(OpenMemfd(NewMemfd("k", PageBytes(), Seal::kShrinkAndWrite), PageBytes()).ok());
}

TEST(MemfdTransport, RefusesWritingThroughAReadOnlyDescriptor) {
  const UniqueFd writable = NewMemfd("k", PageBytes());
  UniqueFd read_only(
      ::open(absl::StrCat("/proc/self/fd/", writable.get()).c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(read_only.valid());
  EXPECT_EQ(OpenMemfd(std::move(read_only), PageBytes(), RegionAccess::kReadWrite).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(MemfdTransport, ClientCannotTruncateWhatIsMapped) {
  const UniqueFd client = NewMemfd("k", 2 * PageBytes());
  RegionDescriptor descriptor = Whole("memfd", 2 * PageBytes());
  descriptor.fd.Reset(::fcntl(client.get(), F_DUPFD_CLOEXEC, 0));
  const auto region = TransportOf("memfd")->Open(std::move(descriptor));
  ASSERT_TRUE(region.ok()) << region.status();
  errno = 0;
  EXPECT_EQ(::ftruncate(client.get(), 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ((*region)->data()[2 * PageBytes() - 1],
            static_cast<std::byte>((2 * PageBytes() - 1) % 251));
}

TEST(PosixShmTransport, RefusesNamesThatLeaveTheNamespace) {
  for (const char* name :
       {"", "/", "plain", "/../etc/passwd", "/..", "/.", "/a/b", "/a b", "//a"}) {
    RegionDescriptor descriptor = Whole("posix_shm", PageBytes());
    descriptor.name = name;
    const absl::Status status = TransportOf("posix_shm")->Open(std::move(descriptor)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_TRUE(absl::StrContains(status.message(), "posix_name")) << name << ": " << status;
  }
}

}  // namespace
}  // namespace keepset::service
