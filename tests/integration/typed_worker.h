// A worker that uses the typed client: synthetic prompts as its plain structs, and tables that fit
// them.
#ifndef KEEPSET_TESTS_INTEGRATION_TYPED_WORKER_H_
#define KEEPSET_TESTS_INTEGRATION_TYPED_WORKER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "clients/cpp/client.h"
#include "tests/fakes/synthetic_prompt.h"

namespace keepset::integration {

// A compilerkv operation also finds the perplexity it wants.
client::OperationSpec TypedSpec(const fakes::SyntheticPrompt& prompt, const std::string& policy,
                                int64_t budget_tokens);

// Views into the prompt's own memory.
client::LayerInput TypedLayer(const fakes::SyntheticPrompt& prompt, int64_t layer);
std::vector<client::LayerInput> TypedLayers(const fakes::SyntheticPrompt& prompt);

// Copies every tensor of `layers` into `region` and points them there.
void MoveInto(client::SharedRegion& region, std::vector<client::LayerInput>& layers);

// Fails the test when the server is not there.
std::unique_ptr<client::Client> ConnectTo(const std::string& address, client::Transport transport);

// The file of a uniform table that fits the prompt's model.
std::string TableFileFor(const fakes::SyntheticPrompt& prompt, const std::string& name,
                         const std::string& version, float gate);

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_TYPED_WORKER_H_
