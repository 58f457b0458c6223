// What Keepset asks of etcd (v3 API): read a prefix at one revision, write by compare-and-set,
// watch from a revision on. Knows several endpoints of one cluster and moves on when one does not
// answer; logs in anew when its token is no longer taken; reads its certificate and password files
// whenever it connects, so that rotated ones are picked up.
//
// Thread-safe. Errors keep etcd's message behind the endpoint: Unavailable and DeadlineExceeded
// mean that no endpoint answered; PermissionDenied and Unauthenticated that our user may not.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_CLIENT_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/registry/etcd_source_options.h"

namespace keepset::service::etcd {

using ClientOptions = EtcdClientOptions;

struct KeyValue {
  std::string key;
  std::string value;
  int64_t mod_revision = 0;
};

// Keys as they stood at one revision.
struct RangeResult {
  uint64_t cluster_id = 0;
  int64_t revision = 0;
  std::vector<KeyValue> pairs;  // in key order
};

// Holds when the key was last written at mod_revision; 0: when there is no such key.
struct Condition {
  std::string key;
  int64_t mod_revision = 0;
};

struct Write {
  enum class Kind { kPut, kDelete };
  Kind kind = Kind::kPut;
  std::string key;
  std::string value;  // kPut
};

struct Change {
  enum class Kind { kPut, kDelete };
  Kind kind = Kind::kPut;
  KeyValue pair;  // kDelete: without a value
};

// What a watch tells next.
struct WatchEvent {
  enum class Kind {
    kCreated,    // the watch stands
    kChanged,    // everything one revision changed below the prefix
    kProgress,   // nothing up to this revision
    kCompacted,  // the first revision asked for is forgotten: read again; the watch has ended
  };
  Kind kind = Kind::kCreated;
  uint64_t cluster_id = 0;
  int64_t revision = 0;  // kCreated: of the store, which may be older than asked for
  std::vector<Change> changes;
};

// One watch on one connection. One thread calls Next; Cancel may be called from any.
class WatchStream {
 public:
  virtual ~WatchStream() = default;  // cancels
  // Waits for the next event. Cancelled after Cancel; any other error: the connection or the watch
  // has ended, watch again from the revision after the last one told.
  virtual absl::StatusOr<WatchEvent> Next() = 0;
  virtual void Cancel() = 0;
};

class Client {
 public:
  virtual ~Client() = default;

  // Every key that begins with `prefix`, in as many calls as it takes, all at one revision.
  virtual absl::StatusOr<RangeResult> ReadPrefix(absl::string_view prefix) = 0;
  // When the newest of these keys was written, as all of etcd agrees at the time of the call; 0:
  // there is none.
  virtual absl::StatusOr<int64_t> NewestRevision(absl::string_view prefix) = 0;

  // All of `writes` at one revision, which is returned, if every condition holds. Aborted: one does
  // not, somebody else wrote. Unavailable and DeadlineExceeded after the request was sent leave
  // open whether it was carried out; the message says so. It is not sent twice.
  virtual absl::StatusOr<int64_t> Commit(const std::vector<Condition>& conditions,
                                         const std::vector<Write>& writes) = 0;

  // Tells what happens below `prefix` from `first_revision` on.
  virtual absl::StatusOr<std::unique_ptr<WatchStream>> Watch(absl::string_view prefix,
                                                             int64_t first_revision) = 0;

  // Drops the connection; the next call begins with the next endpoint.
  virtual void UseNextEndpoint() = 0;
  // Ends running calls; every call from now on is Cancelled. Watches are cancelled by their owners.
  virtual void Shutdown() = 0;
};

// InvalidArgument: no endpoint, a malformed one, http and https mixed, half a key pair, a user name
// without a password file, or a password that would cross the network in the clear (login without
// TLS at an endpoint that is not this host).
absl::StatusOr<std::unique_ptr<Client>> NewClient(const ClientOptions& options);

// The first key behind every key that begins with `prefix`: the range_end of etcd's prefix reads.
std::string PrefixEnd(absl::string_view prefix);

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_CLIENT_H_
