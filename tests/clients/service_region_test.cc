// What the server is told of its memory, and when.
#include "clients/cpp/service_region.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "clients/cpp/service_mapping.h"

namespace keepset::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

class ScriptedMapping final : public ServiceMapping {
 public:
  ScriptedMapping(absl::Status unmapped, std::vector<std::string>& events)
      : unmapped_(std::move(unmapped)), events_(events) {}
  absl::Status Unmap() override {
    events_.push_back("unmap");
    return unmapped_;
  }
  std::byte* data() const override { return const_cast<std::byte*>(&byte_); }

 private:
  const absl::Status unmapped_;
  std::vector<std::string>& events_;
  const std::byte byte_{};
};

std::unique_ptr<ServiceRegion> NewRegion(const std::string& kind, absl::Status unmapped,
                                         std::vector<std::string>& events,
                                         std::vector<absl::Status> answers = {}) {
  ServiceMemory memory;
  memory.kind = kind;
  memory.size_bytes = 1;
  return std::make_unique<ServiceRegion>(
      "r", memory, 0, std::make_unique<ScriptedMapping>(std::move(unmapped), events),
      [&events] { events.push_back("forget"); },
      [&events, answers = std::move(answers), told = std::make_shared<size_t>(0)] {
        events.push_back("tell");
        return *told < answers.size() ? answers[(*told)++] : absl::OkStatus();
      });
}

TEST(ServiceRegion, TheServerIsToldOnceItIsUnmapped) {
  std::vector<std::string> events;
  const auto region = NewRegion("cuda_ipc", absl::OkStatus(), events);
  EXPECT_TRUE(region->Retire().ok());
  EXPECT_THAT(events, ElementsAre("forget", "unmap", "tell"));
}

TEST(ServiceRegion, TheServerIsNotToldWhenItCouldNotBeUnmapped) {
  std::vector<std::string> events;
  auto region =
      NewRegion("cuda_ipc", absl::InternalError("cuIpcCloseMemHandle: error 700"), events);
  const absl::Status status = region->Retire();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("region \"r\": not unmapped"));
  EXPECT_EQ(region->data(), nullptr);
  region = nullptr;
  EXPECT_THAT(events, ElementsAre("forget", "unmap", "forget"));
}

TEST(ServiceRegion, TheServerIsToldUntilItHasAnswered) {
  std::vector<std::string> events;
  const auto region = NewRegion("cuda_ipc", absl::OkStatus(), events,
                                {absl::DeadlineExceededError("in use"), absl::OkStatus()});
  EXPECT_EQ(region->Retire().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(region->Retire().ok());
  EXPECT_TRUE(region->Retire().ok());
  EXPECT_THAT(events, ElementsAre("forget", "unmap", "tell", "forget", "tell", "forget"));
}

TEST(ServiceRegion, AServerThatKnowsTheRegionNoMoreIsNotAskedAgain) {
  std::vector<std::string> events;
  const auto region =
      NewRegion("cuda_ipc", absl::OkStatus(), events, {absl::NotFoundError("restarted")});
  EXPECT_EQ(region->Retire().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(region->Retire().ok());
  EXPECT_THAT(events, ElementsAre("forget", "unmap", "tell", "forget"));
}

TEST(ServiceRegion, AMappingThatStaysIsNeverTold) {
  std::vector<std::string> events;
  const auto region = NewRegion("cuda_ipc", absl::InternalError("error 700"), events);
  EXPECT_EQ(region->Retire().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(region->Retire().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(events, ElementsAre("forget", "unmap", "forget"));
}

TEST(ServiceRegion, OnlyHostMemoryOfTheSessionBeforeIsToBeCopied) {
  std::vector<std::string> events;
  const auto host = NewRegion("memfd", absl::OkStatus(), events);
  const auto device = NewRegion("cuda_vmm", absl::OkStatus(), events);
  host->NoteLost();
  device->NoteLost();
  EXPECT_THAT(std::string(host->status().message()), HasSubstr("copy what is needed"));
  EXPECT_THAT(std::string(device->status().message()), Not(HasSubstr("copy")));
}

}  // namespace
}  // namespace keepset::client
