#include "service/memory/transport_set.h"

#include <cstddef>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::service {

MemoryTransport* TransportSet::Find(absl::string_view kind) const {
  for (const auto& transport : transports_) {
    if (transport->kind() == kind) return transport.get();
  }
  return nullptr;
}

absl::Status TransportSet::UnknownKind(absl::string_view kind) const {
  constexpr size_t kMostEchoed = 32;
  bool has_device = false;
  std::vector<absl::string_view> kinds;
  for (const auto& transport : transports_) {
    kinds.push_back(transport->kind());
    has_device = has_device || SpaceOf(transport->kind()) == MemorySpace::kDevice;
  }
  const std::string asked =
      absl::StrCat("kind=\"", absl::CHexEscape(kind.substr(0, kMostEchoed)), "\"");
  const std::string taken = absl::StrJoin(kinds, ", ");
  if (SpaceOf(kind) == MemorySpace::kDevice && !has_device) {
    return absl::FailedPreconditionError(
        absl::StrCat(asked, ": this server has no device, want a server with backend \"cuda\", or ",
                     "memory of one of: ", taken));
  }
  return absl::NotFoundError(absl::StrCat(asked, ": not taken here, want one of: ", taken));
}

std::vector<SessionCounts::ByKind> TransportSet::Counts() const {
  std::vector<SessionCounts::ByKind> counts;
  for (const auto& transport : transports_) {
    SessionCounts::ByKind& kind = counts.emplace_back();
    kind.kind = std::string(transport->kind());
    kind.device_bytes = transport->DeviceBytes();
  }
  return counts;
}

}  // namespace keepset::service
