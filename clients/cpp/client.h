// Typed client of keepsetd.
//
//   auto client = Client::Connect({.address = "unix:/run/keepset/keepset.sock"});
//   auto region = SharedRegion::Create("kv", bytes);             // write K, V and queries into it
//   (*client)->RegisterRegion(**region, "kv", RegionAccess::kReadOnly);
//   auto result = (*client)->CompressUnary(spec, layers);        // result->layers[l].sets[0]...
//
// A client is one session of the server: it owns the gRPC channel, the side-socket connection and
// the thread that renews the lease, and ends the session when it is destroyed. Regions stay the
// caller's and must outlive their registration. Thread-safe.
#ifndef KEEPSET_CLIENTS_CPP_CLIENT_H_
#define KEEPSET_CLIENTS_CPP_CLIENT_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "clients/cpp/device_memory.h"
#include "clients/cpp/operation.h"
#include "clients/cpp/server_info.h"
#include "clients/cpp/service_region.h"
#include "clients/cpp/shared_region.h"

namespace keepset::client {

enum class Transport {
  kAuto,    // memfd where the server and the address allow it, else inline
  kMemfd,   // shared memory, or an error
  kInline,  // every tensor inside the message
};
absl::string_view TransportName(Transport transport);

enum class RegionAccess { kReadOnly, kReadWrite };

// PEM files. The certificate and its key are for servers that ask clients for one.
struct TlsOptions {
  std::string ca_file;  // whom to trust; empty: the system's certificates
  std::string certificate_file;
  std::string key_file;
  std::string server_name;  // expected in the server's certificate; empty: the address's host
};

struct ClientOptions {
  std::string address;            // "unix:/path" or "host:port"
  std::optional<TlsOptions> tls;  // for host:port; absent: plain text
  Transport transport = Transport::kAuto;
  std::string engine = "keepset-cpp";  // free text for the server's log
  std::string tenant;
  // Names this client over restarts of the server; absent: random.
  std::optional<std::array<uint8_t, 16>> client_uuid;
  absl::Duration lease;  // zero: the server's default
  absl::Duration connect_timeout = absl::Seconds(5);
  absl::Duration call_timeout = absl::Seconds(60);  // of every later call, queueing included
};

// Whose operations GetStatistics tells of.
enum class StatisticsOf { kServer, kSession };

// Many operations over one long-lived stream, each: Begin, SendLayer in ascending order, Finish.
// Thread-safe; an operation is sent by one thread at a time. Every wait is bounded by the client's
// call_timeout. The client must outlive the stream.
class CompressStream {
 public:
  virtual ~CompressStream() = default;

  // The id of the new operation.
  virtual absl::StatusOr<uint64_t> Begin(const OperationSpec& spec) = 0;
  // Waits until the server grants a layer input, and while 1 MiB waits to be sent. What is inline
  // has been copied on return. When the operation was refused meanwhile, answers why; the operation
  // is over then.
  virtual absl::Status SendLayer(uint64_t operation, const LayerInput& layer) = 0;
  // Keep sets of layers that came before the end of the operation (layer-local policies).
  virtual std::vector<LayerResult> TakeEarlyResults(uint64_t operation) = 0;
  // Ends the operation and waits for its result. Layer inputs must outlive this call when they lie
  // in regions.
  virtual absl::StatusOr<OperationResult> Finish(uint64_t operation) = 0;
  // Gives the operation up; nothing happens for one that is over. A call of another thread that
  // waits for it ends with Cancelled.
  virtual absl::Status Cancel(uint64_t operation) = 0;
};

class Client {
 public:
  // Unavailable: nobody answers at the address. FailedPrecondition: memfd was asked for and this
  // server or address cannot do it. InvalidArgument: address of another form, or TLS options that
  // cannot be used.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const ClientOptions& options);
  virtual ~Client() = default;

  // kMemfd or kInline, and for kAuto the reason of the choice.
  virtual Transport transport() const = 0;
  virtual std::string transport_reason() const = 0;

  virtual absl::StatusOr<ServerInfo> GetServerInfo() = 0;
  // kSession: of this client's own. FailedPrecondition: it has none (inline transport).
  virtual absl::StatusOr<ServerStatistics> GetStatistics(StatisticsOf whose) = 0;

  // Makes `region` known to the server under `name`; from then on tensors inside it travel as
  // slices. With inline transport nothing is sent. AlreadyExists: name taken.
  virtual absl::Status RegisterRegion(const SharedRegion& region, const std::string& name,
                                      RegionAccess access) = 0;
  // The same for device memory, for servers that list its kind among their transports.
  // FailedPrecondition: no session (inline transport).
  virtual absl::Status RegisterRegion(const DeviceRegion& region, const std::string& name,
                                      RegionAccess access) = 0;
  // Fresh zeroed memory of the server's own as a read-write region of this client, mapped here: a
  // place for results that the server keeps from others until it is retired, for as long as the
  // session lives (ServiceRegion::status). The client must outlive it. ResourceExhausted: a limit
  // of the server's, named. FailedPrecondition: the server gives none of this kind, or the client
  // has no session (inline transport).
  virtual absl::StatusOr<std::unique_ptr<ServiceRegion>> AllocateRegion(
      const std::string& name, const ServiceMemory& memory) = 0;
  // Answers when no operation uses the region any more. Calls no longer name it, whatever the
  // answer; after another error than NotFound (no such name) the memory may still be in use: ask
  // again.
  virtual absl::Status RetireRegion(const std::string& name) = 0;

  // What has to be sent for `spec`, of which model, policy, parameters and table are looked at.
  virtual absl::StatusOr<InputNeeds> GetRequirements(const OperationSpec& spec) = 0;

  // All layers in one call, those the policy does not read aside. Gathered rows are viewed where
  // they lie: in the destination regions or in bytes the result owns.
  virtual absl::StatusOr<OperationResult> CompressUnary(const OperationSpec& spec,
                                                        absl::Span<const LayerInput> layers) = 0;
  // The same over a stream of its own.
  absl::StatusOr<OperationResult> CompressStreamed(const OperationSpec& spec,
                                                   absl::Span<const LayerInput> layers);
  virtual absl::StatusOr<std::unique_ptr<CompressStream>> OpenStream() = 0;

  // OK while the session lives. NotFound or Unavailable after a restart of the server: Reopen.
  virtual absl::Status SessionStatus() const = 0;
  // The server said that it is shutting down: retire what is held of its own memory, which ends
  // with it. False without a session. Does not wait; the news comes with a heartbeat at the latest.
  virtual bool draining() const = 0;
  // Opens the session again under the same client uuid and registers every region again; memory of
  // the server's own is lost (ServiceRegion::status). Harmless when the session still lives: it is
  // replaced. Not while operations are running.
  virtual absl::Status Reopen() = 0;
};

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_CLIENT_H_
