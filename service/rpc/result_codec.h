// Engine result -> wire. Stateless and thread-safe.
#ifndef KEEPSET_SERVICE_RPC_RESULT_CODEC_H_
#define KEEPSET_SERVICE_RPC_RESULT_CODEC_H_

#include <cstdint>

#include "engine/operation_types.h"
#include "keepset/v1/compression.pb.h"

namespace keepset::service {

// Indices as little-endian int32; a set of all positions travels as `all`.
void EncodeLayer(int64_t layer, const engine::LayerResult& result, int64_t seq_len,
                 v1::LayerResult* wire);

// Everything the engine knows: transport, queue and lease time and gathered bytes are the caller's.
void EncodeResult(const engine::OperationResult& result, v1::OperationResult* wire);

// Sum over layers of the kept positions; the mean over KV heads where sets differ per head.
int64_t KeptTokens(const engine::OperationResult& result);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_RESULT_CODEC_H_
