// The KV codecs of this build, listed in codecs.def.
#ifndef KEEPSET_ENGINE_CODECS_CODEC_REGISTRY_H_
#define KEEPSET_ENGINE_CODECS_CODEC_REGISTRY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/codecs/kv_codec.h"

namespace keepset::engine {

// Names as listed in codecs.def, in that order.
std::vector<std::string> ListCodecs();

// NotFound lists the known codecs.
absl::StatusOr<std::unique_ptr<KvCodec>> NewCodec(absl::string_view name);

}  // namespace keepset::engine

#endif  // KEEPSET_ENGINE_CODECS_CODEC_REGISTRY_H_
