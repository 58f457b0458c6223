// The layers of a request as a server can read them: copied into shared memory, or as views of the
// capture that travel inside the messages.
#ifndef KEEPSET_CLIENTS_CLI_REMOTE_LAYERS_H_
#define KEEPSET_CLIENTS_CLI_REMOTE_LAYERS_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cpp/client.h"
#include "clients/cpp/operation.h"
#include "engine/keepset.h"

namespace keepset::cli {

enum class GatherWish { kNone, kKeptRows };

// Views of `observation`, nothing copied.
client::LayerInput ToLayerInput(int64_t layer, const keepset_layer_observation& observation);

struct RemoteLayers {
  // Owns the bytes of `inputs` with shared memory; declared before them.
  std::unique_ptr<client::SharedRegion> source;
  std::unique_ptr<client::SharedRegion> destination;
  std::vector<client::LayerInput> inputs;
};

// With memfd transport: copies every tensor into a region and registers it, and with kKeptRows a
// second, writable region for as many rows as the source has. The layers must not outlive the
// client's registration. Otherwise the inputs stay as they are.
absl::StatusOr<RemoteLayers> PlaceLayers(client::Client& client,
                                         std::vector<client::LayerInput> inputs, int64_t seq_len,
                                         GatherWish gather);

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_REMOTE_LAYERS_H_
