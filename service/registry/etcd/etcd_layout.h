// How tables and lines lie in etcd. docs/operations.md describes it for operators.
//
//   <prefix>/tables/<name>/<version>
//       the bytes of a table file, or {"digest": "sha256:...", "path": "..."}
//   <prefix>/signatures/<name>/<version>
//       the detached signature of that table, 64 bytes or their base64
//   <prefix>/lines/<name>
//       what was decided about a line, as JSON
//
// A '/' inside a name or version is written %2F. Pure functions, thread-safe.
#ifndef KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_LAYOUT_H_
#define KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_LAYOUT_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/registry/registry_types.h"

namespace keepset::service::etcd {

struct Key {
  enum class Kind { kTable, kSignature, kLine };
  Kind kind = Kind::kTable;
  std::string name;
  std::string version;  // kTable, kSignature
};

class Layout {
 public:
  // A '/' at the end of `prefix` makes no difference.
  explicit Layout(absl::string_view prefix);

  const std::string& root() const { return root_; }  // every key of ours begins with it
  std::string TableKey(absl::string_view name, absl::string_view version) const;
  std::string SignatureKey(absl::string_view name, absl::string_view version) const;
  std::string LineKey(absl::string_view name) const;
  // InvalidArgument: below the prefix, but of neither form.
  absl::StatusOr<Key> Parse(absl::string_view key) const;

 private:
  const std::string root_;
};

// A table that lies in a file of the shared volume.
struct TablePointer {
  std::string digest;  // "sha256:<64 hex>"
  std::string path;    // relative to the volume, without ".."
};

// Whether a value is meant to be a TablePointer and not a table file. No value is both: the header
// length that begins a table file has zero bytes, JSON text has none.
bool IsTablePointer(absl::string_view value);
// InvalidArgument names field, value and what would be right. `where` begins every message.
absl::StatusOr<TablePointer> ParseTablePointer(absl::string_view value, absl::string_view where);
std::string SerializeTablePointer(const TablePointer& pointer);

// The value of a line's key. Written by hand, a target may lack its digest (resolved among the
// tables of the line) and anything may be missing; unknown keys are ignored. InvalidArgument as
// above.
absl::StatusOr<LineAssignment> ParseLine(absl::string_view value, absl::string_view where);
std::string SerializeLine(const LineAssignment& assignment);

}  // namespace keepset::service::etcd

#endif  // KEEPSET_SERVICE_REGISTRY_ETCD_ETCD_LAYOUT_H_
