// A synthetic prompt in device memory.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_DEVICE_PROMPT_H_
#define KEEPSET_TESTS_KERNELS_CUDA_DEVICE_PROMPT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/operation_types.h"
#include "tests/fakes/synthetic_prompt.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace keepset::kernels {

// `prompt` must outlive it.
class DevicePrompt {
 public:
  explicit DevicePrompt(const fakes::SyntheticPrompt& prompt) : prompt_(prompt) {
    for (int64_t layer = 0; layer < prompt.shape().num_layers; ++layer) {
      const engine::LayerObservation host = prompt.observation(layer);
      layers_.push_back({Copy(host.q_window), Copy(host.k), Copy(host.v)});
    }
  }

  engine::ObservedLayer layer(int64_t layer) const {
    engine::ObservedLayer observed = {layer, prompt_.observation(layer)};
    observed.observation.q_window.data = layers_[layer].q->data();
    observed.observation.k.data = layers_[layer].k->data();
    observed.observation.v.data = layers_[layer].v->data();
    return observed;
  }
  std::vector<engine::ObservedLayer> layers() const {
    std::vector<engine::ObservedLayer> all;
    for (int64_t i = 0; i < prompt_.shape().num_layers; ++i) all.push_back(layer(i));
    return all;
  }

 private:
  struct Layer {
    std::unique_ptr<DeviceBytes> q;
    std::unique_ptr<DeviceBytes> k;
    std::unique_ptr<DeviceBytes> v;
  };
  template <typename View>
  static std::unique_ptr<DeviceBytes> Copy(const View& view) {
    return std::make_unique<DeviceBytes>(
        std::vector<std::byte>(view.data, view.data + view.size_bytes));
  }

  const fakes::SyntheticPrompt& prompt_;
  std::vector<Layer> layers_;
};

}  // namespace keepset::kernels

#endif  // KEEPSET_TESTS_KERNELS_CUDA_DEVICE_PROMPT_H_
