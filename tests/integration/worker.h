// What an inference worker does, in small: turns a synthetic prompt into messages, passes memory
// through the side socket, talks on a stream.
#ifndef KEEPSET_TESTS_INTEGRATION_WORKER_H_
#define KEEPSET_TESTS_INTEGRATION_WORKER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "keepset/v1/compression.grpc.pb.h"
#include "keepset/v1/session.grpc.pb.h"
#include "service/memory/memory_transport.h"
#include "tests/fakes/synthetic_prompt.h"
#include "tests/integration/server_fixture.h"

namespace keepset::integration {

v1::OperationSpec WireSpec(const fakes::SyntheticPrompt& prompt, const std::string& policy,
                           uint64_t budget_tokens);
// Inline tensors.
v1::LayerInput WireLayer(const fakes::SyntheticPrompt& prompt, int64_t layer);
v1::CompressRequest WireRequest(const fakes::SyntheticPrompt& prompt, const std::string& policy,
                                uint64_t budget_tokens);

// Unary call; `result` may be nullptr.
grpc::Status Compress(TestServer& server, const v1::CompressRequest& request,
                      v1::OperationResult* result);

// A session with its side-socket connection; closing the connection ends the session.
class WorkerSession {
 public:
  explicit WorkerSession(TestServer& server, const std::string& tenant = "");

  const std::string& id() const { return id_; }
  // Registers sealed memory; the worker's mapping of it is data().
  struct Region {
    std::string id;
    std::byte* data = nullptr;
    size_t bytes = 0;
    service::UniqueFd fd;
  };
  Region Register(const std::string& name, size_t bytes, v1::RegionAccess access);
  // Passes `fd` and returns its token; 0 when the server refused.
  uint64_t PassFd(int fd);
  grpc::Status Retire(const std::string& region_id, uint32_t timeout_ms);
  v1::ListRegionsResponse List();
  void HangUp() { side_socket_.Reset(); }
  v1::SessionService::Stub& stub() { return *stub_; }

 private:
  std::unique_ptr<v1::SessionService::Stub> stub_;
  std::string id_;
  service::UniqueFd side_socket_;
};

// Lays tensors into a region, one after the other.
class RegionWriter {
 public:
  explicit RegionWriter(WorkerSession::Region& region) : region_(region) {}
  // A slice of the region that holds a copy of `bytes`.
  void Put(absl::Span<const std::byte> bytes, v1::TensorData* data);
  // An empty slice of `bytes`.
  uint64_t Reserve(size_t bytes, v1::TensorData* data);

 private:
  WorkerSession::Region& region_;
  uint64_t end_ = 0;
};

// The inline tensors of `request` moved into `region`, for session `session_id`.
v1::CompressRequest ToRegion(const v1::CompressRequest& request, const std::string& session_id,
                             WorkerSession::Region& region);

// One CompressStream, used from one thread.
class WorkerStream {
 public:
  explicit WorkerStream(TestServer& server);
  ~WorkerStream();

  void Begin(uint64_t id, const v1::OperationSpec& spec);
  void Layer(uint64_t id, const v1::LayerInput& layer);
  void End(uint64_t id);
  void Cancel(uint64_t id);
  // The next message that is no credit; nullopt when the stream is over.
  std::optional<v1::StreamResponse> Next();
  // The same without early layer results.
  std::optional<v1::StreamResponse> NextAnswer();
  // Reads, and forgets what it reads, until the stream has granted `total` layer inputs.
  bool AwaitCredit(uint64_t total);
  void HalfClose();
  // Half-closes unless that is done, reads to the end.
  grpc::Status Finish();
  // The client is gone.
  void Kill() { context_->TryCancel(); }

 private:
  std::unique_ptr<v1::CompressionService::Stub> stub_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::StreamRequest, v1::StreamResponse>> stream_;
  uint64_t credit_ = 0;
  bool half_closed_ = false;
  bool finished_ = false;
};

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_WORKER_H_
