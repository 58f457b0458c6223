// Reads a file completely, at a moment when nobody is writing it.
//
// A writer that overwrites a table in place may, half way, have written bytes that are a valid
// table: no check of the content can tell. So the file is read under a read lease (file_lease.h),
// which the kernel grants only while nobody has it open for writing, by descriptor or by mapping;
// a reader without the lease tries again later. Where the kernel grants no leases to this process
// (a file of another user without CAP_LEASE, as ConfigMaps are for a non-root process, or a
// filesystem without them), the file must have been unchanged for kSettleTime and stay so across
// the read; there, a writer in place that pauses for longer than that between two writes can still
// be seen half way, and writing aside and renaming is the only safe way. In both cases a writer
// that closes the file half way and opens it again has published that half itself.
#ifndef KEEPSET_SERVICE_REGISTRY_STABLE_READ_H_
#define KEEPSET_SERVICE_REGISTRY_STABLE_READ_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace keepset::service {

// Tells one state of a file from another, links followed.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;
  int64_t size_bytes = 0;
  int64_t modified_ns = 0;  // Unix time
  int64_t changed_ns = 0;   // Unix time

  bool operator==(const FileIdentity&) const = default;
};

inline constexpr absl::Duration kSettleTime = absl::Seconds(1);

enum class LeaseUse {
  kWhereGranted,
  kNever,  // the rule for files that cannot be leased
};

// NotFound: no such file, or a link that leads nowhere. PermissionDenied. InvalidArgument: not a
// regular file.
absl::StatusOr<FileIdentity> IdentityOf(const std::string& path);

// The bytes of the file in state `expected`, which it is known to have been in for `unchanged_for`.
// Unavailable: being written, not settled, or no longer in that state: look again later.
// NotFound, PermissionDenied, InvalidArgument as above; ResourceExhausted: no descriptor or memory;
// Internal: the medium failed.
absl::StatusOr<std::string> ReadStable(const std::string& path, const FileIdentity& expected,
                                       absl::Duration unchanged_for, LeaseUse lease_use);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_STABLE_READ_H_
