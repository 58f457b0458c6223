// One input as registry.json: what is accepted reads back the same from what would be written.
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "base/check.h"
#include "service/registry/registry_document.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using keepset::service::ParseRegistryDocument;
  const auto document =
      ParseRegistryDocument(absl::string_view(reinterpret_cast<const char*>(data), size), "input");
  if (!document.ok()) return 0;
  const auto again = ParseRegistryDocument(SerializeRegistryDocument(*document), "again");
  KEEPSET_CHECK(again.ok() && *again == *document);
  return 0;
}
