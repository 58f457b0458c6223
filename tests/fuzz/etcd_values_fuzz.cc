// Values of etcd keys: whatever somebody put there is refused or means exactly one thing.
//
// Input: byte 0 chooses the form, the rest is the value.
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "service/registry/etcd/etcd_layout.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace etcd = keepset::service::etcd;
  if (size < 1) return 0;
  const std::string value(reinterpret_cast<const char*>(data + 1), size - 1);
  switch (data[0] % 3) {
    case 0: {
      const auto line = etcd::ParseLine(value, "line");
      if (!line.ok()) {
        KEEPSET_CHECK(absl::IsInvalidArgument(line.status()));
        return 0;
      }
      const auto again = etcd::ParseLine(etcd::SerializeLine(*line), "line");
      // A hand-written target without a digest cannot be written back.
      KEEPSET_CHECK(!again.ok() || *again == *line);
      return 0;
    }
    case 1: {
      const auto pointer = etcd::ParseTablePointer(value, "table");
      if (!pointer.ok()) return 0;
      KEEPSET_CHECK(pointer->path.find("..") != 0 && pointer->path[0] != '/');
      const auto again = etcd::ParseTablePointer(etcd::SerializeTablePointer(*pointer), "table");
      KEEPSET_CHECK(again.ok() && again->path == pointer->path);
      return 0;
    }
    default: {
      const etcd::Layout layout("/k");
      const auto key = layout.Parse("/k/" + value);
      if (!key.ok()) return 0;
      KEEPSET_CHECK(!key->name.empty());
      return 0;
    }
  }
}
