// What etcd says, turned into what the registry takes: every key below the prefix with its last
// good meaning. A damaged value, or one whose signature is not as wanted, is a failure beside the
// last good table or line of its key; the same keys give the same set, whatever order they came in.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_TABLES_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_TABLES_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "service/registry/etcd/etcd_client.h"
#include "service/registry/etcd/etcd_layout.h"
#include "service/registry/registry_types.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"

namespace keepset::service::etcd {

struct TablesOptions {
  std::string prefix;
  int64_t max_value_bytes = 0;
  std::string shared_directory;  // of TablePointer files; empty: none are read
};

// Not thread-safe.
class EtcdTables {
 public:
  // `loader` outlives this.
  EtcdTables(const TablesOptions& options, TableLoader& loader)
      : options_(options), layout_(options.prefix), loader_(loader) {}

  void Replace(const RangeResult& all);
  void Apply(const std::vector<Change>& changes);

  // Whether a file of the shared volume was missing or had another digest: it may still be on its
  // way there.
  bool has_missing_files() const;
  // Looks for those again. True when one is there now.
  bool RetryFiles();

  // The whole set. Lines that etcd says nothing about, or nothing any more, are given an assignment
  // without choices: what is served depends on etcd's content alone. `known_lines` are those the
  // registry has from etcd already.
  SourceSet Set(const std::set<std::string>& known_lines) const;

  // Whether etcd holds any line, damaged ones too.
  bool has_lines() const { return !lines_.empty(); }
  // When each table's, signature's and line's value was written, by etcd key: conditions for
  // writes.
  std::map<std::string, int64_t> Revisions() const;

 private:
  struct TableEntry {
    Key key;
    int64_t mod_revision = 0;
    // The newest value, where it cannot be had from `table`: a pointer, or bytes that were refused.
    std::string value;
    TablePtr table;         // last good
    std::string signature;  // that `table` was accepted with
    absl::Status health;    // of the newest value
    std::optional<TablePointer> awaited;
  };
  struct SignatureEntry {
    int64_t mod_revision = 0;
    std::string signature;
  };
  struct LineEntry {
    Key key;
    int64_t mod_revision = 0;
    LineAssignment assignment;
    absl::Status health;
  };
  struct BadKey {
    int64_t mod_revision = 0;
    absl::Status why;
  };

  void Put(const KeyValue& pair);
  void Erase(const std::string& key);
  // True: it was the key of a signature, and is dealt with.
  bool TakeSignature(const KeyValue& pair, Change::Kind kind);
  // A signature came, changed or went: what its table is now.
  void JudgeAgain(const std::string& table_key);
  std::string SignatureOf(const std::string& table_key) const;
  std::string Instance(const std::string& table_key, int64_t mod_revision) const;
  void Load(std::string value, const std::string& key, TableEntry& entry);
  absl::Status LoadValue(const std::string& value, const std::string& origin, TableEntry& entry);
  absl::Status LoadFile(const TablePointer& pointer, const std::string& origin, TableEntry& entry);
  absl::Status LoadBytes(std::string bytes, const std::string& origin, TableEntry& entry);
  // The target with its digest, as far as the line's tables tell it.
  TableTarget Resolved(const std::string& name, TableTarget target) const;
  LineAssignment Resolved(const std::string& name, LineAssignment assignment) const;
  SharedRevisions Shared() const;

  const TablesOptions options_;
  const Layout layout_;
  TableLoader& loader_;
  uint64_t cluster_id_ = 0;
  std::map<std::string, TableEntry> tables_;          // by etcd key
  std::map<std::string, SignatureEntry> signatures_;  // by the etcd key of their table
  std::map<std::string, LineEntry> lines_;
  std::map<std::string, BadKey> bad_keys_;
};

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_TABLES_H_
