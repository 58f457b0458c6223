// The transports of a server by kind, and what a kind that it does not take is told.
#ifndef KEEPSET_SERVICE_MEMORY_TRANSPORT_SET_H_
#define KEEPSET_SERVICE_MEMORY_TRANSPORT_SET_H_

#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "service/memory/memory_transport.h"
#include "service/memory/session_manager.h"

namespace keepset::service {

// Immutable; thread-safe.
class TransportSet {
 public:
  explicit TransportSet(std::vector<std::unique_ptr<MemoryTransport>> transports)
      : transports_(std::move(transports)) {}

  // nullptr: not taken here.
  MemoryTransport* Find(absl::string_view kind) const;
  // NotFound; FailedPrecondition for memory of a device where there is none.
  absl::Status UnknownKind(absl::string_view kind) const;
  // Every kind, with the device memory it keeps allocated.
  std::vector<SessionCounts::ByKind> Counts() const;

 private:
  const std::vector<std::unique_ptr<MemoryTransport>> transports_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_MEMORY_TRANSPORT_SET_H_
