#include "tests/gpu/owned_worker.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "tests/fakes/test_seed.h"
#include "tests/gpu/ipc_driver.h"
#include "tests/gpu/ipc_worker.h"
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
constexpr int64_t kBudget = 64;
constexpr int64_t kRowBytes = kHeadDim * 2;
constexpr int64_t kQueryBytes = kQoHeads * kRows * kRowBytes;
constexpr int64_t kKeyBytes = kKvHeads * kTokens * kRowBytes;
constexpr int64_t kKeptBytes = kKvHeads * kBudget * kRowBytes;
constexpr int64_t kInputBytes = kQueryBytes + 2 * kKeyBytes;

client::OperationSpec Spec() {
  client::OperationSpec spec;
  spec.request_id = "gpu-owned";
  spec.model = {"test", kLayers, kQoHeads, kKvHeads, kHeadDim, "", ""};
  spec.seq_len = kTokens;
  spec.num_rows = kRows;
  spec.softmax_scale = 0.125f;
  spec.kv_dtype = client::DType::kBF16;
  spec.policy = "snapkv";
  spec.budget.kind = client::Budget::Kind::kTokens;
  spec.budget.tokens = kBudget;
  spec.gather = client::GatherMode::kDestination;
  return spec;
}

// Of every layer queries, keys, values, then room for the kept keys and values.
std::vector<client::LayerInput> Layers(const std::byte* memory) {
  const auto take = [&](auto& tensor, int64_t bytes) {
    tensor.data = memory;
    tensor.size_bytes = bytes;
    tensor.dtype = client::DType::kBF16;
    memory += bytes;
  };
  std::vector<client::LayerInput> layers(kLayers);
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    client::LayerInput& input = layers[layer];
    input.layer = layer;
    take(input.q_window, kQueryBytes);
    take(input.k, kKeyBytes);
    take(input.v, kKeyBytes);
    client::Destination& destination = input.destination.emplace();
    destination.capacity_tokens = kBudget;
    take(destination.k, kKeptBytes);
    take(destination.v, kKeptBytes);
  }
  return layers;
}

// Small bfloat16 numbers of either sign.
std::vector<uint16_t> RandomNumbers(int64_t bytes) {
  std::mt19937_64 random(fakes::TestSeed(11));
  std::vector<uint16_t> numbers(bytes / 2);
  for (uint16_t& number : numbers) {
    const uint64_t bits = random();
    number = static_cast<uint16_t>((bits & 0x807f) | ((0x7c + (bits >> 32) % 4) << 7));
  }
  return numbers;
}

class Worker {
 public:
  Worker(std::string address, std::string kind)
      : address_(std::move(address)), kind_(std::move(kind)) {}

  absl::Status Run(const std::string& phase) {
    if (const std::string error = driver_.Open(); !error.empty()) return Failed(error);
    free_at_first_ = driver_.FreeBytes();
    client::ClientOptions options;
    options.address = address_;
    options.transport = client::Transport::kMemfd;
    KEEPSET_ASSIGN_OR_RETURN(client_, client::Client::Connect(options));
    KEEPSET_RETURN_IF_ERROR(Allocate());
    KEEPSET_RETURN_IF_ERROR(ExpectZeros());
    if (phase == "owned_mapped") StandStill("ready");
    if (phase == "owned_outlive") return Outlive();
    KEEPSET_RETURN_IF_ERROR(Compress());
    if (phase == "owned_calling") {
      Say("ready");
      absl::Status status;
      while (status.ok()) status = Compress();
      return status;
    }
    if (phase == "owned_lost" || phase == "owned_word") {
      KEEPSET_RETURN_IF_ERROR(client_->Reopen());
      if (region_->status().code() != absl::StatusCode::kFailedPrecondition) {
        return Failed("memory of the session before is not lost");
      }
      if (phase == "owned_lost") StandStill("ready");
    }
    KEEPSET_RETURN_IF_ERROR(region_->Retire());
    if (phase == "owned_word") StandStill("retired");
    return absl::OkStatus();
  }

 private:
  static absl::Status Failed(const std::string& what) { return absl::InternalError(what); }

  absl::Status Allocate() {
    KEEPSET_ASSIGN_OR_RETURN(const client::ServerInfo info, client_->GetServerInfo());
    if (info.devices.empty()) return Failed("the server lists no device");
    client::ServiceMemory memory;
    memory.kind = kind_;
    memory.size_bytes = kRegionBytes;
    memory.device_uuid = info.devices[0].uuid;
    KEEPSET_ASSIGN_OR_RETURN(region_, client_->AllocateRegion("out", memory));
    return absl::OkStatus();
  }

  // At both ends, a part that operations do not reach included.
  absl::Status ExpectZeros() {
    std::vector<std::byte> piece(1 << 20);
    for (std::byte* const at :
         {region_->data(), region_->data() + kRegionBytes - static_cast<int64_t>(piece.size())}) {
      if (!driver_.Read(piece.data(), at, static_cast<int64_t>(piece.size()))) {
        return Failed("read");
      }
      for (const std::byte byte : piece) {
        if (byte != std::byte{0}) return Failed("memory of the server's is not zero");
      }
    }
    return absl::OkStatus();
  }

  absl::Status Compress() {
    const std::vector<client::LayerInput> layers = Layers(region_->data());
    const std::vector<uint16_t> numbers = RandomNumbers(kInputBytes);
    for (const client::LayerInput& layer : layers) {
      auto* const begin =
          const_cast<std::byte*>(static_cast<const std::byte*>(layer.q_window.data));
      if (!driver_.Write(begin, numbers.data(), kInputBytes)) return Failed("write");
    }
    KEEPSET_ASSIGN_OR_RETURN(const client::OperationResult result,
                             client_->CompressUnary(Spec(), layers));
    if (result.transport != kind_) return Failed("transport " + result.transport);
    const auto* const keys = reinterpret_cast<const std::byte*>(numbers.data()) + kQueryBytes;
    for (const client::LayerResult& layer : result.layers) {
      if (layer.gathered.size() != kKvHeads) return Failed("no rows were gathered");
      for (int64_t head = 0; head < kKvHeads; ++head) {
        const client::GatheredHead& rows = layer.gathered[head];
        const std::vector<int32_t>& kept =
            layer.sets[layer.sets.size() == 1 ? 0 : head].keep_indices;
        const std::byte* const k = keys + head * kTokens * kRowBytes;
        KEEPSET_RETURN_IF_ERROR(ExpectRows(rows.k, rows.k_row_bytes, kept, k));
        KEEPSET_RETURN_IF_ERROR(ExpectRows(rows.v, rows.v_row_bytes, kept, k + kKeyBytes));
      }
    }
    return absl::OkStatus();
  }

  // That row i in device memory is row kept[i] of `source`, bit for bit.
  absl::Status ExpectRows(const std::byte* rows, int64_t row_bytes,
                          const std::vector<int32_t>& kept, const std::byte* source) {
    if (kept.size() != kBudget) return Failed(absl::StrCat(kept.size(), " rows were kept"));
    std::byte row[kRowBytes];
    for (size_t i = 0; i < kept.size(); ++i) {
      if (!driver_.Read(row, rows + static_cast<int64_t>(i) * row_bytes, kRowBytes)) {
        return Failed("read");
      }
      if (!std::equal(row, row + kRowBytes, source + kept[i] * kRowBytes)) {
        return Failed(absl::StrCat("row ", i, " is not row ", kept[i], " of the cache"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Outlive() {
    Say("ready");
    if (!Eventually([&] { return !client_->SessionStatus().ok(); })) {
      return Failed("the server lives");
    }
    absl::Status status;
    if (!Eventually([&] { return (status = client_->Reopen()).ok(); })) return status;
    if (region_->status().code() != absl::StatusCode::kFailedPrecondition) {
      return Failed("memory of a server that is gone is not lost");
    }
    Say("lost");
    status = region_->Retire();
    // A driver may refuse to close what a process that is gone exported; the memory then goes with
    // this one.
    if (absl::IsInternal(status)) StandStill(absl::StrCat("over: ", status.ToString()));
    if (!absl::IsNotFound(status)) return Failed(absl::StrCat("retire: ", status.ToString()));
    if (!Eventually([&] { return driver_.FreeBytes() >= free_at_first_ - kSlackBytes; })) {
      return Failed(absl::StrCat("free_bytes=", driver_.FreeBytes(), ", want ",
                                 free_at_first_ - kSlackBytes));
    }
    StandStill("over: freed");
  }

  const std::string address_;
  const std::string kind_;
  Driver driver_;
  int64_t free_at_first_ = 0;
  std::unique_ptr<client::Client> client_;
  std::unique_ptr<client::ServiceRegion> region_;
};

}  // namespace

int RunOwnedWorker(const std::string& address, const std::string& kind, const std::string& phase) {
  return ExitStatus(Worker(address, kind).Run(phase));
}

}  // namespace keepset::gpu
