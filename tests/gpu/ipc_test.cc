// Device memory between two processes and a real keepsetd: kill -9 of either side in each phase
// gives the memory back, by the driver's own count of free memory.
//
//   gpu_ipc_test                       the tests
//   gpu_ipc_test --worker ADDRESS PHASE   a worker that stands still in PHASE, or ends (see Worker)
//
// KEEPSET_KEEPSETD names the server's program, else keepsetd beside this one. KEEPSET_LAUNCHER:
// words before every program (a dynamic linker with its options; KEEPSET_IPC_TEST names this
// program then). Skips, with the reason, without a device.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/cuda_abi.h"
#include "clients/cpp/client.h"
#include "clients/cpp/device_memory.h"
#include "tests/integration/child_process.h"
#include "tests/integration/eventually.h"

namespace keepset::gpu {
namespace {

using integration::ChildProcess;
using integration::Eventually;

constexpr int64_t kRegionBytes = int64_t{256} << 20;
// Contexts and pools of a driver move by some tens of MiB.
constexpr int64_t kSlackBytes = int64_t{64} << 20;

constexpr int64_t kLayers = 2;
constexpr int64_t kQoHeads = 8;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kHeadDim = 64;
constexpr int64_t kRows = 16;
constexpr int64_t kTokens = 4096;
constexpr int64_t kElement = 2;

// The driver on this thread, with device 0 current.
class Driver {
 public:
  // Empty, or why there is no device.
  std::string Open() {
    void* const library = ::dlopen(client::kLibcuda, RTLD_NOW);
    if (library == nullptr) return "no device: no libcuda.so.1";
    const auto entry = [&]<typename Function>(const char* name, Function*& function) {
      function = reinterpret_cast<Function*>(::dlsym(library, name));
      return function != nullptr;
    };
    cuda_abi::Result (*init)(unsigned int) = nullptr;
    cuda_abi::Result (*count)(int*) = nullptr;
    cuda_abi::Result (*retain)(cuda_abi::Context*, cuda_abi::Device) = nullptr;
    cuda_abi::Result (*push)(cuda_abi::Context) = nullptr;
    if (!entry("cuInit", init) || !entry("cuDeviceGetCount", count) ||
        !entry("cuDevicePrimaryCtxRetain", retain) || !entry("cuCtxPushCurrent_v2", push) ||
        !entry("cuMemAlloc_v2", allocate_) || !entry("cuMemFree_v2", free_) ||
        !entry("cuMemGetInfo_v2", info_)) {
      return "no device: libcuda.so.1 lacks an entry point";
    }
    entry("cuMemsetD8_v2", set_);
    int devices = 0;
    cuda_abi::Context context = nullptr;
    if (init(0) != cuda_abi::kSuccess || count(&devices) != cuda_abi::kSuccess || devices == 0 ||
        retain(&context, 0) != cuda_abi::kSuccess || push(context) != cuda_abi::kSuccess) {
      return "no device: the driver gives none";
    }
    return "";
  }

  int64_t FreeBytes() const {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    if (info_(&free_bytes, &total_bytes) != cuda_abi::kSuccess) return -1;
    return static_cast<int64_t>(free_bytes);
  }
  // Zeros; null when there is no memory.
  std::byte* Allocate(int64_t bytes) const {
    cuda_abi::DevicePointer pointer = 0;
    const auto size = static_cast<size_t>(bytes);
    if (allocate_(&pointer, size) != cuda_abi::kSuccess) return nullptr;
    if (set_ != nullptr && set_(pointer, 0, size) != cuda_abi::kSuccess) return nullptr;
    return reinterpret_cast<std::byte*>(pointer);
  }
  bool Free(std::byte* memory) const {
    return free_(reinterpret_cast<cuda_abi::DevicePointer>(memory)) == cuda_abi::kSuccess;
  }

 private:
  cuda_abi::Result (*allocate_)(cuda_abi::DevicePointer*, size_t) = nullptr;
  cuda_abi::Result (*free_)(cuda_abi::DevicePointer) = nullptr;
  cuda_abi::Result (*info_)(size_t*, size_t*) = nullptr;
  cuda_abi::Result (*set_)(cuda_abi::DevicePointer, unsigned char, size_t) = nullptr;
};

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

[[noreturn]] void StandStill() {
  std::cout << "ready" << std::endl;
  while (true) ::pause();
}

int Fail(const std::string& what) {
  std::cout << "failed: " << what << std::endl;
  return 1;
}

// Phases: "registered" and "compressed" stand still there, "compressing" calls for ever, "whole"
// does everything and ends, "outlive" waits until the server is gone, frees its memory and says so.
int Worker(const std::string& address, const std::string& phase) {
  Driver driver;
  if (const std::string error = driver.Open(); !error.empty()) return Fail(error);
  std::byte* const memory = driver.Allocate(kRegionBytes);
  if (memory == nullptr) return Fail("no device memory");
  auto region = client::DeviceRegion::Export(memory, kRegionBytes);
  if (!region.ok()) return Fail(region.status().ToString());
  client::ClientOptions options;
  options.address = address;
  options.transport = client::Transport::kMemfd;
  auto client = client::Client::Connect(options);
  if (!client.ok()) return Fail(client.status().ToString());
  absl::Status status = (*client)->RegisterRegion(**region, "kv", client::RegionAccess::kReadOnly);
  if (!status.ok()) return Fail(status.ToString());
  if (phase == "registered") StandStill();
  if (phase == "outlive") {
    std::cout << "ready" << std::endl;
    if (!Eventually([&] { return !(*client)->SessionStatus().ok(); })) return Fail("server lives");
    client->reset();
    region->reset();
    if (!driver.Free(memory)) return Fail("free");
    std::cout << "freed" << std::endl;
    while (true) ::pause();
  }
  const std::vector<client::LayerInput> layers = Layers(memory);
  auto result = (*client)->CompressUnary(Spec(), layers);
  if (!result.ok()) return Fail(result.status().ToString());
  if (result->transport != "cuda_ipc") return Fail("transport " + result->transport);
  if (phase == "compressed") StandStill();
  if (phase == "compressing") {
    std::cout << "ready" << std::endl;
    while ((*client)->CompressUnary(Spec(), layers).ok()) {
    }
    return Fail("a call was refused");
  }
  status = (*client)->RetireRegion("kv");
  return status.ok() && driver.Free(memory) ? 0 : Fail(status.ToString());
}

std::string Environment(const char* name, const std::string& otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

class DeviceIpc : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = driver_.Open(); !reason.empty()) GTEST_SKIP() << reason;
    char name[] = "/tmp/keepset-ipc-XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    directory_ = name;
    StartServer();
    // Contexts and pools exist before memory is counted.
    EXPECT_EQ(NewWorker("whole")->Wait(), 0);
  }
  void TearDown() override {
    server_.reset();
    if (!directory_.empty()) std::filesystem::remove_all(directory_);
  }

  void StartServer() {
    const std::string config = absl::StrCat(directory_, "/keepsetd.conf");
    std::ofstream(config) << "backend: \"cuda\"\n";
    const std::string beside = std::filesystem::path(Program()).parent_path() / "keepsetd";
    server_ = NewProcess({Environment("KEEPSET_KEEPSETD", beside), "--config", config, "--listen",
                          Address(), "--metrics-listen", "off"},
                         ChildProcess::Output::kStderr);
    ASSERT_NE(server_->AwaitLine("ready"), "");
  }

  std::unique_ptr<ChildProcess> NewWorker(const std::string& phase) const {
    return NewProcess({Program(), "--worker", Address(), phase}, ChildProcess::Output::kStdout);
  }

  // Whether as much memory is free as `before`, soon.
  bool IsBack(int64_t before) const {
    return Eventually([&] { return driver_.FreeBytes() >= before - kSlackBytes; });
  }

  std::string Address() const { return absl::StrCat("unix:", directory_, "/k.sock"); }

  Driver driver_;
  std::string directory_;
  std::unique_ptr<ChildProcess> server_;

 private:
  // With a launcher /proc/self/exe is the launcher.
  static std::string Program() {
    return Environment("KEEPSET_IPC_TEST", std::filesystem::read_symlink("/proc/self/exe"));
  }
  static std::unique_ptr<ChildProcess> NewProcess(std::vector<std::string> words,
                                                  ChildProcess::Output output) {
    std::vector<std::string> all =
        absl::StrSplit(Environment("KEEPSET_LAUNCHER", ""), ' ', absl::SkipEmpty());
    all.insert(all.end(), words.begin(), words.end());
    return std::make_unique<ChildProcess>(all, output);
  }
};

TEST_F(DeviceIpc, AKilledWorkerGivesItsMemoryBack) {
  const int64_t before = driver_.FreeBytes();
  for (const char* const phase : {"registered", "compressing", "compressed"}) {
    const auto worker = NewWorker(phase);
    ASSERT_NE(worker->AwaitLine("ready"), "") << phase;
    EXPECT_LE(driver_.FreeBytes(), before - kRegionBytes + kSlackBytes) << phase;
    worker->Kill();
    EXPECT_TRUE(IsBack(before)) << phase;
    EXPECT_FALSE(server_->HasEnded()) << phase << ", wait status " << server_->Wait();
  }
  EXPECT_EQ(NewWorker("whole")->Wait(), 0);
}

TEST_F(DeviceIpc, AKilledServerHoldsNothingOfAWorker) {
  const int64_t before = driver_.FreeBytes();
  const auto worker = NewWorker("outlive");
  ASSERT_NE(worker->AwaitLine("ready"), "");
  EXPECT_LE(driver_.FreeBytes(), before - kRegionBytes + kSlackBytes);
  server_->Kill();
  EXPECT_NE(worker->AwaitLine("freed"), "");
  worker->Kill();
  EXPECT_TRUE(IsBack(before));
}

TEST_F(DeviceIpc, AKilledServerInTheMiddleOfACallLeavesTheWorkerItsError) {
  const auto worker = NewWorker("compressing");
  ASSERT_NE(worker->AwaitLine("ready"), "");
  server_->Kill();
  EXPECT_NE(worker->AwaitLine("a call was refused"), "");
}

}  // namespace
}  // namespace keepset::gpu

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "--worker") {
    return keepset::gpu::Worker(argv[2], argv[3]);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
