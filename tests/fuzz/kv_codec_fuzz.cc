// Any bytes handed to any codec decode or are refused; nothing is written outside the destination.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "engine/codecs/codec_registry.h"
#include "kernels/backend_registry.h"

namespace keepset::engine {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kRows = 4;
constexpr int64_t kHeadDim = 4;

void DecodeAll(absl::Span<const std::byte> encoded) {
  const auto backend = kernels::NewBackend("cpu", {.num_threads = 1});
  if (!backend.ok()) std::abort();
  const auto context = (*backend)->NewContext();
  if (!context.ok()) std::abort();
  for (const std::string& name : ListCodecs()) {
    std::vector<float> rows(kHeads * kRows * kHeadDim);
    kernels::MutableKvView out;
    out.data = reinterpret_cast<std::byte*>(rows.data());
    out.size_bytes = static_cast<int64_t>(rows.size() * sizeof(float));
    out.num_kv_heads = kHeads;
    out.seq_len = kRows;
    out.head_dim = kHeadDim;
    out.head_stride = kRows * kHeadDim;
    out.token_stride = kHeadDim;
    const auto decoded = (*NewCodec(name))->Decode(**backend, **context, encoded, out);
    if (decoded.ok() && (*decoded < 1 || *decoded > kRows)) std::abort();
  }
}

}  // namespace
}  // namespace keepset::engine

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  keepset::engine::DecodeAll(absl::MakeConstSpan(reinterpret_cast<const std::byte*>(data), size));
  return 0;
}
