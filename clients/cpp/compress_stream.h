// Implementation side of CompressStream (client.h).
#ifndef KEEPSET_CLIENTS_CPP_COMPRESS_STREAM_H_
#define KEEPSET_CLIENTS_CPP_COMPRESS_STREAM_H_

#include <memory>
#include <string>

#include "absl/time/time.h"
#include "clients/cpp/client.h"
#include "clients/cpp/wire_codec.h"
#include "keepset/v1/compression.grpc.pb.h"

namespace keepset::client {

// `stub` must outlive the stream. `session_id` is empty without a session.
std::unique_ptr<CompressStream> NewCompressStream(v1::CompressionService::Stub* stub,
                                                  std::string session_id, RegionResolver resolve,
                                                  KvPlacement placement,
                                                  absl::Duration call_timeout);

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_COMPRESS_STREAM_H_
