#include "tests/gpu/ipc_worker.h"

#include <atomic>
#include <cstddef>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "clients/cpp/client.h"
#include "clients/cpp/device_memory.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/worker_lines.h"
#include "tests/integration/eventually.h"

namespace keepset::gpu {
namespace {

using integration::Eventually;

constexpr int64_t kLayers = 2;
constexpr int64_t kQoHeads = 8;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kHeadDim = 64;
constexpr int64_t kRows = 16;
constexpr int64_t kTokens = 4096;
constexpr int64_t kElement = 2;
constexpr char kRegion[] = "kv";

client::OperationSpec Spec() {
  client::OperationSpec spec;
  spec.request_id = "gpu-ipc";
  spec.model = {"test", kLayers, kQoHeads, kKvHeads, kHeadDim, "", ""};
  spec.seq_len = kTokens;
  spec.num_rows = kRows;
  spec.softmax_scale = 0.125f;
  spec.kv_dtype = client::DType::kBF16;
  spec.policy = "snapkv";
  spec.budget.kind = client::Budget::Kind::kTokens;
  spec.budget.tokens = 64;
  return spec;
}

// Queries and keys of every layer one after the other in `memory`.
std::vector<client::LayerInput> Layers(const std::byte* memory) {
  constexpr int64_t kQueryBytes = kQoHeads * kRows * kHeadDim * kElement;
  constexpr int64_t kKeyBytes = kKvHeads * kTokens * kHeadDim * kElement;
  std::vector<client::LayerInput> layers(kLayers);
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    client::LayerInput& input = layers[layer];
    input.layer = layer;
    input.q_window.data = memory;
    input.q_window.size_bytes = kQueryBytes;
    input.q_window.dtype = client::DType::kBF16;
    input.k.data = memory + kQueryBytes;
    input.k.size_bytes = kKeyBytes;
    input.k.dtype = client::DType::kBF16;
    memory += kQueryBytes + kKeyBytes;
  }
  return layers;
}

absl::Status FailedBecause(const std::string& what) { return absl::InternalError(what); }

class Worker {
 public:
  Worker(std::string address, std::string kind)
      : address_(std::move(address)), kind_(std::move(kind)) {}

  absl::Status Run(const std::string& phase) {
    if (const std::string error = driver_.Open(); !error.empty()) return FailedBecause(error);
    free_at_first_ = driver_.FreeBytes();
    memory_ = driver_.Allocate(kind_, kRegionBytes);
    if (memory_ == nullptr) return FailedBecause("no device memory");
    auto region = client::DeviceRegion::Export(memory_, kRegionBytes);
    if (!region.ok()) return region.status();
    region_ = *std::move(region);
    if (region_->kind() != kind_) return FailedBecause("exported as " + region_->kind());
    if (phase == "exported") StandStill("ready");
    if (absl::string_view size = phase; absl::ConsumePrefix(&size, "sized_")) {
      int64_t bytes = 0;
      return absl::SimpleAtoi(size, &bytes) ? Sized(bytes) : FailedBecause("phase " + phase);
    }
    if (phase == "handle") return Handle(After::kLives);
    if (phase == "freed_handle") return Handle(After::kIsFreed);
    if (absl::Status status = Connect(); !status.ok()) return status;
    if (phase == "retiring") return RetireForEver();
    if (absl::Status status = Register(); !status.ok()) return status;
    if (phase == "registered") StandStill("ready");
    if (phase == "outlive") return Outlive();
    if (absl::Status status = Call(); !status.ok()) return status;
    if (phase == "compressed") StandStill("ready");
    if (phase == "compressing") {
      CallUntilRefused();
      return FailedBecause("a call was refused");
    }
    if (phase == "outlive_call") {
      CallUntilRefused();
      return GiveBack();
    }
    if (phase == "reopening") return Reopen();
    if (absl::Status status = client_->RetireRegion(kRegion); !status.ok()) return status;
    return driver_.Free(memory_) ? absl::OkStatus() : FailedBecause("free");
  }

 private:
  absl::Status Connect() {
    client::ClientOptions options;
    options.address = address_;
    options.transport = client::Transport::kMemfd;
    auto client = client::Client::Connect(options);
    if (client.ok()) client_ = *std::move(client);
    return client.status();
  }

  absl::Status Register() {
    return client_->RegisterRegion(*region_, kRegion, client::RegionAccess::kReadOnly);
  }

  absl::Status Call() {
    const auto result = client_->CompressUnary(Spec(), Layers(memory_));
    if (result.ok() && result->transport != kind_) {
      return FailedBecause("transport " + result->transport);
    }
    return result.status();
  }

  void CallUntilRefused() {
    Say("ready");
    while (Call().ok()) {
    }
  }

  // Each retire begins beside calls that it has to wait for, or that it refuses.
  absl::Status RetireForEver() {
    for (bool is_first = true; true; is_first = false) {
      if (absl::Status status = Register(); !status.ok()) return status;
      std::atomic<int> calls = 0;
      std::atomic<bool> is_over = false;
      std::thread caller([&] {
        while (!is_over) {
          static_cast<void>(Call());
          ++calls;
        }
      });
      Eventually([&] { return calls > 0; });
      if (is_first) Say("ready");
      const absl::Status retired = client_->RetireRegion(kRegion);
      is_over = true;
      caller.join();
      if (!retired.ok()) return retired;
    }
  }

  absl::Status Outlive() {
    Say("ready");
    if (!Eventually([&] { return !client_->SessionStatus().ok(); })) {
      return FailedBecause("the server lives");
    }
    return GiveBack();
  }

  absl::Status GiveBack() {
    client_.reset();
    region_.reset();
    if (!driver_.Free(memory_)) return FailedBecause("free");
    // The server's own context is gone as well, which makes more room than there was.
    if (!Eventually([&] { return driver_.FreeBytes() >= free_at_first_ - kSlackBytes; })) {
      return FailedBecause(absl::StrCat("free_bytes=", driver_.FreeBytes(), ", want ",
                                        free_at_first_ - kSlackBytes));
    }
    StandStill("freed");
  }

  absl::Status Reopen() {
    CallUntilRefused();
    Say("alone");
    absl::Status status;
    if (!Eventually([&] { return (status = client_->Reopen()).ok(); })) return status;
    if (status = Call(); !status.ok()) return status;
    StandStill("again");
  }

  absl::Status Sized(int64_t bytes) {
    for (int i = 0; i < 2; ++i) {
      std::byte* const memory = driver_.Allocate(kByIpc, bytes);
      const std::vector<unsigned char> pattern(kSizedBytes, kSizedPattern + i);
      if (memory == nullptr || !driver_.Write(memory, pattern.data(), kSizedBytes)) {
        return FailedBecause("write");
      }
      if (i == 0) {
        const auto exported = client::DeviceRegion::Export(memory, kSizedBytes);
        Say(exported.ok() ? "exported" : absl::StrCat("refused: ", exported.status().ToString()));
      }
      const Driver::RawHandle handle = driver_.HandleOf(memory);
      if (handle.bytes.empty()) return FailedBecause("the driver gives no handle");
      Say(absl::StrCat("handle ", absl::BytesToHexString(handle.bytes), " ",
                       handle.allocation_bytes, " ", region_->device_uuid(), " ",
                       handle.generation));
    }
    StandStill("all");
  }

  enum class After { kLives, kIsFreed };

  absl::Status Handle(After memory) {
    const std::string line = absl::StrCat("handle ", absl::BytesToHexString(region_->ipc_handle()),
                                          " ", region_->allocation_bytes(), " ",
                                          region_->device_uuid(), " ", region_->generation());
    if (memory == After::kIsFreed && !driver_.Free(memory_)) return FailedBecause("free");
    StandStill(line);
  }

  const std::string address_;
  const std::string kind_;
  Driver driver_;
  int64_t free_at_first_ = 0;
  std::byte* memory_ = nullptr;
  std::unique_ptr<client::DeviceRegion> region_;
  std::unique_ptr<client::Client> client_;
};

}  // namespace

int RunIpcWorker(const std::string& address, const std::string& kind, const std::string& phase) {
  return ExitStatus(Worker(address, kind).Run(phase));
}

}  // namespace keepset::gpu
