#include "service/metrics/process_usage.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "gtest/gtest.h"

namespace keepset::service {
namespace {

TEST(ProcessUsage, CountsDescriptors) {
  const double before = ReadProcessUsage().open_fds;
  const int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  EXPECT_EQ(ReadProcessUsage().open_fds, before + 1);
  close(fd);
  EXPECT_EQ(ReadProcessUsage().open_fds, before);
}

TEST(ProcessUsage, CountsMappings) {
  const double before = ReadProcessUsage().memory_mappings;
  // Neighbours of unlike access are never merged into one mapping.
  const long page = sysconf(_SC_PAGESIZE);
  void* const mapped = mmap(nullptr, 3 * page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  ASSERT_EQ(mprotect(static_cast<char*>(mapped) + page, page, PROT_NONE), 0);
  EXPECT_GE(ReadProcessUsage().memory_mappings, before + 2);
  munmap(mapped, 3 * page);
}

TEST(ProcessUsage, StatesTheSoftLimits) {
  rlimit limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const ProcessUsage usage = ReadProcessUsage();
  EXPECT_EQ(usage.max_fds, static_cast<double>(limit.rlim_cur));
  EXPECT_LE(usage.open_fds, usage.max_fds);
  EXPECT_GT(usage.max_memory_mappings, usage.memory_mappings);
  EXPECT_GT(usage.resident_bytes, 1 << 20);
  EXPECT_LE(usage.locked_bytes, usage.max_locked_bytes);
}

}  // namespace
}  // namespace keepset::service
