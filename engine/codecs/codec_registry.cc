#include "engine/codecs/codec_registry.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace keepset::engine {

#define KEEPSET_CODEC(name, factory) std::unique_ptr<KvCodec> factory();
#include "engine/codecs/codecs.def"
#undef KEEPSET_CODEC

std::vector<std::string> ListCodecs() {
  return {
#define KEEPSET_CODEC(name, factory) #name,
#include "engine/codecs/codecs.def"
#undef KEEPSET_CODEC
  };
}

absl::StatusOr<std::unique_ptr<KvCodec>> NewCodec(absl::string_view name) {
#define KEEPSET_CODEC(listed_name, factory) \
  if (name == #listed_name) return factory();
#include "engine/codecs/codecs.def"
#undef KEEPSET_CODEC
  return absl::NotFoundError(
      absl::StrCat("unknown codec '", name, "', known are ", absl::StrJoin(ListCodecs(), ", ")));
}

}  // namespace keepset::engine
